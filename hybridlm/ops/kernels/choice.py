"""Which backend each operator of a model uses: decided once before training, then an argument of every call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Backend = Literal["torch", "cuda"]
TORCH: Backend
CUDA: Backend
TORCH, CUDA = get_args(Backend)


@dataclass(frozen=True)
class KernelChoice:
    """A backend for each operator that has a compiled one. The operator still falls back to torch, quietly, for a call
    that its kernel cannot take (``rules``): a token decoded after a state, float64, ..."""

    conv: Backend = TORCH
    mamba1: Backend = TORCH
    mamba2: Backend = TORCH  # the scan alone
    mamba2_layer: Backend = TORCH  # convolution, scan, norm and output projection in one
    mamba3_siso: Backend = TORCH
    mamba3_mimo: Backend = TORCH
    loss: Backend = TORCH


ALL_TORCH = KernelChoice()
