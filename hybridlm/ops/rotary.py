"""Rotary position embedding, half-split layout (Su et al. 2021; the layout of GPT-NeoX and Llama)."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm.ops.norm import at_least_fp32


def rotary_angles(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, T, head_dim / 2) of ``position * theta^(-2i / head_dim)``, in at least fp32.

    positions: (B, T) integers.
    """
    wide = at_least_fp32(dtype)
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=wide) / head_dim
    angles = positions.to(wide).unsqueeze(-1) * theta**-exponents
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (i, i + head_dim / 2) of x (B, T, H, head_dim) by the angles (B, T, head_dim / 2)."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)  # the same for every head
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
