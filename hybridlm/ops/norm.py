"""RMS normalisation, plain and gated."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and states: float32, or float64 where the input is float64."""
    return torch.promote_types(dtype, torch.float32)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last axis; the mean is taken in at least fp32 (Zhang & Sennrich 2019).

    x: (..., C); weight: (C,). Returns x's shape and dtype.
    """
    wide = at_least_fp32(x.dtype)
    return F.rms_norm(x.to(wide), (x.shape[-1],), weight.to(wide), eps).to(x.dtype)


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, *, groups: int, norm_before_gate: bool) -> Tensor:
    """Mamba-2's output norm, over each of ``groups`` slices of the last axis.

    ``norm_before_gate=False``: ``rms(y * silu(z)) * weight`` (Mamba-2); True: ``rms(y) * weight * silu(z)`` (FalconH1).
    y, z: (..., E); weight: (E,). Returns y's shape and dtype.
    """
    wide = at_least_fp32(y.dtype)
    y_wide, gate = y.to(wide), F.silu(z.to(wide))
    if not norm_before_gate:
        y_wide = y_wide * gate
    if groups == 1:
        normed = F.rms_norm(y_wide, (y.shape[-1],), weight.to(wide), eps)
    else:
        grouped = y_wide.unflatten(-1, (groups, -1))
        normed = F.rms_norm(grouped, (grouped.shape[-1],), None, eps).flatten(-2) * weight.to(wide)
    return (normed * gate if norm_before_gate else normed).to(y.dtype)
