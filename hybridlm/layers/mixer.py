"""The contract of a sequence mixer. The model knows mixers only through it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn

from hybridlm.layers.cache import LayerCache
from hybridlm.layers.init import Init, ParamSpec
from hybridlm.layers.sequence import SequenceInfo

Phase = Literal["train", "prefill", "decode"]
PASSES: dict[Phase, int] = {"train": 3, "prefill": 1, "decode": 1}  # a backward costs two forwards


class Mixer(nn.Module, ABC):
    """Moves information between the tokens of a sequence: attention, a Mamba, ...

    One ``forward`` serves training, prefill in chunks and decode: with a cache, any T >= 1 tokens may follow any
    prefix.
    """

    @abstractmethod
    def forward(self, x: Tensor, seq: SequenceInfo, cache: LayerCache | None = None) -> Tensor:
        """x: (B, T, D), normalised; returns (B, T, D). A given cache is read and brought up to date in place."""

    @abstractmethod
    def new_cache(self, batch: int, max_len: int, *, dtype: torch.dtype, device: torch.device) -> LayerCache:
        """An empty cache for up to ``max_len`` tokens; ``dtype`` is that of activations (states stay at least fp32)."""

    @abstractmethod
    def flops(self, context: int, phase: Phase) -> float:
        """Matrix-product FLOPs per token: of a sequence of ``context`` tokens (train: with backward; prefill), or of
        one token decoded after ``context`` others. A multiply-add counts two."""

    @abstractmethod
    def state_bytes(self, context: int, batch: int, dtype: torch.dtype) -> int:
        """Bytes of the cache that ``new_cache(batch, context, dtype=dtype)`` allocates."""

    @abstractmethod
    def reset_parameters(self, init: Init) -> None:
        """Draws every parameter anew."""

    @abstractmethod
    def param_specs(self) -> dict[str, ParamSpec]:
        """One entry for every parameter, by its name in this module."""


def bytes_of(elements: int, dtype: torch.dtype) -> int:
    """Bytes of so many elements."""
    return elements * dtype.itemsize


def linear_flops(*layers: nn.Linear) -> float:
    """Forward FLOPs per token of these projections."""
    return float(sum(2 * layer.in_features * layer.out_features for layer in layers))
