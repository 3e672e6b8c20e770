"""RMS norms, plain and gated, against their formulas."""

from __future__ import annotations

import pytest
import torch
from recurrences import assert_near, group_rms_norm, relative_error, silu
from recurrences import rms_norm as formula
from torch import Tensor

from hybridlm.ops.norm import at_least_fp32, gated_rms_norm, rms_norm

EPS = 1e-5


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(function, *inputs: Tensor) -> dict[str, Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    grads = torch.autograd.grad((out * draw(*out.shape, seed=9)).sum(), leaves)
    return {"out": out} | {f"d{i}": grad for i, grad in enumerate(grads)}


@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_rms_norm(size):
    """At 1e-3 the mean square is a tenth of epsilon, so that its place in the formula shows."""
    inputs = size * draw(2, 3, 6), draw(6, seed=1)
    assert_near(run(lambda x, w: rms_norm(x, w, EPS), *inputs), run(lambda x, w: formula(x, w, EPS), *inputs), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_without_gradients_it_is_the_same(size, dtype):
    """Then both norms are made of other operators: as exact, in the input's dtype, and what they are given is not
    changed."""
    y, z, weight = (tensor.to(dtype) for tensor in (size * draw(2, 3, 12), draw(2, 3, 12, seed=1), draw(12, seed=2)))
    given = y.clone(), z.clone()

    def results() -> list[Tensor]:
        gated = [gated_rms_norm(y, z, weight, EPS, groups=3, norm_before_gate=order) for order in (False, True)]
        return [rms_norm(y, weight, EPS), *gated]

    weight.requires_grad_()
    with torch.no_grad():
        got = results()
    for a, b in zip(got, results(), strict=True):
        assert a.dtype == b.dtype == dtype
        assert (a.requires_grad, b.requires_grad) == (False, True)
        assert relative_error(a, b.detach()) < {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]
    assert torch.equal(y, given[0])
    assert torch.equal(z, given[1])


def test_a_zero_vector_stays_zero():
    assert torch.equal(rms_norm(torch.zeros(2, 4), torch.ones(4), EPS), torch.zeros(2, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_are_at_least_float32(dtype):
    """The square of 1,000 is infinite in float16, and a bfloat16 sum of squares has two digits: only the result may be
    rounded."""
    x, z, weight = (
        (size * draw(*shape, seed=i)).to(dtype)
        for i, (size, shape) in enumerate([(1000, (8, 64)), (30, (8, 64)), (1, (64,))])
    )
    x64, gate, weight64 = x.double(), silu(z.double()), weight.double()
    pairs = [
        (rms_norm(x, weight, EPS), formula(x64, weight64, EPS)),
        (
            gated_rms_norm(x, z, weight, EPS, groups=2, norm_before_gate=False),
            group_rms_norm(x64 * gate, weight64, 2, EPS),
        ),
        (
            gated_rms_norm(x, z, weight, EPS, groups=2, norm_before_gate=True),
            group_rms_norm(x64, weight64, 2, EPS) * gate,
        ),
    ]
    for out, want in pairs:
        assert out.dtype == dtype
        assert float((out != want.to(dtype)).double().mean()) < 0.01, (
            "a float32 result is rounded elsewhere than a float64 one now and then"
        )


def test_statistics_do_not_narrow_float64():
    assert [at_least_fp32(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)] == [
        torch.float32,
        torch.float32,
        torch.float32,
        torch.float64,
    ]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_gate_then_norm(groups, size):
    inputs = size * draw(2, 3, 8), draw(2, 3, 8, seed=1), draw(8, seed=2)

    def ours(y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        return gated_rms_norm(y, z, weight, EPS, groups=groups, norm_before_gate=False)

    assert_near(run(ours, *inputs), run(lambda y, z, w: group_rms_norm(y * silu(z), w, groups, EPS), *inputs), 1e-12)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_norm_then_gate(groups):
    inputs = draw(2, 3, 8), draw(2, 3, 8, seed=1), draw(8, seed=2)

    def ours(y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        return gated_rms_norm(y, z, weight, EPS, groups=groups, norm_before_gate=True)

    assert_near(run(ours, *inputs), run(lambda y, z, w: group_rms_norm(y, w, groups, EPS) * silu(z), *inputs), 1e-12)
