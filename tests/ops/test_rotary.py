"""Rotary positions against one rotation at a time."""

from __future__ import annotations

import pytest
import torch
from recurrences import relative_error, rotate
from torch import Tensor

from hybridlm.ops.rotary import apply_rotary, rotary_angles


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def turned(x: Tensor, positions: Tensor, theta: float = 100.0, interleaved: bool = False) -> Tensor:
    return apply_rotary(x, *rotary_angles(positions, x.shape[-1], theta, x.dtype), interleaved=interleaved)


@pytest.mark.parametrize("head_dim", [2, 6, 8])
def test_each_row_and_token_turns_by_its_own_position(head_dim):
    x = draw(2, 3, 2, head_dim)
    positions = torch.tensor([[0, 1, 2], [7, 100, 3]])
    want = torch.stack(
        [torch.stack([rotate(x[b, t], int(positions[b, t]), 100.0) for t in range(3)]) for b in range(2)]
    )
    assert relative_error(turned(x, positions), want) < 1e-12


@pytest.mark.parametrize("head_dim", [2, 6, 8])
def test_neighbouring_pairs(head_dim):
    """DeepSeek's layout: pairs (2i, 2i + 1) turn, and come out as all first channels, then all second."""
    x = draw(2, 3, 2, head_dim)
    positions = torch.tensor([[0, 1, 2], [7, 100, 3]])
    sorted_pairs = torch.cat([x[..., 0::2], x[..., 1::2]], -1)
    assert relative_error(turned(x, positions, interleaved=True), turned(sorted_pairs, positions)) < 1e-14
    assert torch.equal(turned(x, torch.zeros_like(positions), interleaved=True), sorted_pairs)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients(interleaved):
    """Also of the gradient, and of a slice of a larger tensor, whose channels are not all contiguous."""
    positions = torch.tensor([[0, 5], [2, 9]])
    x = draw(2, 2, 3, 10).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: turned(x[..., 4:], positions, interleaved=interleaved), x)
    assert torch.autograd.gradgradcheck(lambda x: turned(x[..., 4:], positions, interleaved=interleaved), x)


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_operator(interleaved):
    """What torch.compile and the planner see, and the same result with and without gradients."""
    x, (cos, sin) = draw(1, 3, 2, 6), rotary_angles(torch.tensor([[0, 1, 5]]), 6, 100.0, torch.float64)
    torch.library.opcheck(
        torch.ops.hybridlm.rotate, (x.requires_grad_(), cos.unsqueeze(2), sin.unsqueeze(2), interleaved, False)
    )
    with torch.no_grad():
        plain = apply_rotary(x, cos, sin, interleaved=interleaved)
    assert torch.equal(plain, apply_rotary(x, cos, sin, interleaved=interleaved))


def test_bfloat16_rounds_once():
    """Forward and backward compute in float32, whatever the layout."""
    x, weights = draw(1, 2, 1, 8).bfloat16().requires_grad_(), draw(1, 2, 1, 8).flip(-1).bfloat16()
    cos, sin = rotary_angles(torch.tensor([[300, 301]]), 8, 10_000.0, torch.bfloat16)
    out = apply_rotary(x, cos, sin)
    exact = x.detach().float().requires_grad_()
    out_exact = apply_rotary(exact, cos, sin)
    assert torch.equal(out, out_exact.bfloat16())
    (grad,) = torch.autograd.grad(out, x, weights)
    (grad_exact,) = torch.autograd.grad(out_exact, exact, weights.float())
    assert grad.dtype == torch.bfloat16
    assert torch.equal(grad, grad_exact.bfloat16())


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
