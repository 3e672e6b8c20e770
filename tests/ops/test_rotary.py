"""Rotary positions against one rotation at a time."""

from __future__ import annotations

import pytest
import torch
from recurrences import relative_error, rotate
from torch import Tensor

from hybridlm.ops.rotary import apply_rotary, rotary_angles


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def turned(x: Tensor, positions: Tensor, theta: float = 100.0) -> Tensor:
    return apply_rotary(x, *rotary_angles(positions, x.shape[-1], theta, x.dtype))


@pytest.mark.parametrize("head_dim", [2, 6, 8])
def test_each_row_and_token_turns_by_its_own_position(head_dim):
    x = draw(2, 3, 2, head_dim)
    positions = torch.tensor([[0, 1, 2], [7, 100, 3]])
    want = torch.stack([torch.stack([rotate(x[b, t], int(positions[b, t]), 100.0) for t in range(3)]) for b in range(2)])
    assert relative_error(turned(x, positions), want) < 1e-12


def test_scores_depend_on_distance_only():
    q, k = draw(1, 1, 1, 8), draw(1, 1, 1, 8).flip(-1)
    scores = [float((turned(q, torch.tensor([[p + 5]])) * turned(k, torch.tensor([[p]]))).sum()) for p in (0, 1, 40)]
    assert scores[1:] == pytest.approx([scores[0]] * 2, rel=1e-12)
    assert scores[0] != pytest.approx(float((q * k).sum()), rel=1e-3)


def test_angles_stay_float32_in_bfloat16():
    """bfloat16 cannot tell position 300 from 301."""
    cos, sin = rotary_angles(torch.tensor([[300, 301]]), 4, 10_000.0, torch.bfloat16)
    exact = torch.tensor([[[300.0, 3.0], [301.0, 3.01]]], dtype=torch.float64)
    assert cos.dtype == sin.dtype == torch.float32
    assert relative_error(cos, exact.cos()) < 1e-4
    assert relative_error(sin, exact.sin()) < 1e-4
    x = draw(1, 2, 1, 4).bfloat16()
    out = apply_rotary(x, cos, sin)
    assert out.dtype == torch.bfloat16
    want = torch.stack([rotate(x[:, t].double(), 300 + t, 10_000.0) for t in range(2)], 1)
    assert relative_error(out, want) < 2**-8
