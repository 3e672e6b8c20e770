"""A few tokens' projection, read as a batch of smaller matrices: the same numbers as torch's own, and only where it is
meant for."""

from __future__ import annotations

import pytest
import torch
from recurrences import assert_near, relative_error
from torch.nn import functional as F

from hybridlm.ops import linear as ops_linear
from hybridlm.ops.linear import linear, split_linear

SHAPES = [
    (1160, 256),
    (64, 48),
    (16, 8),
    (34, 7),
    (97, 12),
    (15, 5),
    (8, 8),
    (1, 3),
]  # outputs with and without a divisor that will do


def make(outputs: int, inputs: int, *batch: int, dtype: torch.dtype = torch.float32, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*batch, inputs, generator=g, dtype=dtype), torch.randn(outputs, inputs, generator=g, dtype=dtype)


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Grows with every call that torch's own linear gets from ours."""
    seen: list[int] = []

    def counted(x, weight, bias=None):
        seen.append(x.shape[-1])
        return F.linear(x, weight, bias)

    monkeypatch.setattr(ops_linear, "F", type("F", (), {"linear": staticmethod(counted)}))
    return seen


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("batch", [(1,), (1, 1), (2, 1), (1, 3), (4,), (5,), (2, 9), ()], ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_it_is_torchs_linear(outputs, inputs, batch, biased):
    x, weight = make(outputs, inputs, *batch)
    bias = torch.randn(outputs) if biased else None
    with torch.no_grad():
        got = linear(x, weight, bias)
        want = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert got.dtype == torch.float32
    assert relative_error(got, want) < 2e-6


def test_a_slice_of_a_longer_text_and_of_a_weight():
    """Strides that are not those of a tensor of its own."""
    x, weight = make(64, 32, 2, 5)
    with torch.no_grad():
        assert relative_error(linear(x[:, -1:], weight), F.linear(x[:, -1:], weight)) < 2e-6
        half = weight[:, :16]
        assert relative_error(linear(x[:1, :1, :16], half), F.linear(x[:1, :1, :16], half)) < 2e-6


@pytest.mark.skipif(
    not torch.backends.mkl.is_available(), reason="torch was built without MKL: its own linear is used everywhere"
)
def test_where_torchs_own_is_used(calls):
    (one, weight), (many, _) = make(64, 32, 1, 1), make(64, 32, 1, 9)
    with torch.no_grad():
        linear(one, weight)
        assert calls == []
        linear(many, weight)
        linear(one.double(), weight.double())
        linear(one.bfloat16(), weight.bfloat16())
        linear(*make(97, 32, 1, 1))  # no divisor of 97 will do
        linear(*make(64, 2048, 1, 1))  # wide
        assert len(calls) == 5
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(one, weight).dtype == torch.bfloat16
    linear(one, weight.requires_grad_())
    assert len(calls) == 7


def test_gradients_are_torchs():
    x, weight = make(16, 8, 1, 1, dtype=torch.float64)
    assert torch.autograd.gradcheck(linear, (x.requires_grad_(), weight.requires_grad_()))


SIZES = (5, 1, 10)


def split_run(function, x, weight, *, used: tuple[int, ...] = (0, 1, 2)) -> dict[str, torch.Tensor]:
    """The parts, and the gradients of those that are used."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    parts = function(x, weight)
    g = torch.Generator().manual_seed(3)
    loss = sum((parts[i] * torch.randn(parts[i].shape, generator=g, dtype=parts[i].dtype)).sum() for i in used)
    dx, dweight = torch.autograd.grad(loss, (x, weight))
    return {f"part {i}": part for i, part in enumerate(parts)} | {"dx": dx, "dweight": dweight}


@pytest.mark.parametrize("used", [(0, 1, 2), (1,), (0, 2)], ids=str)
@pytest.mark.parametrize("batch", [(2, 7), (1, 1), (9,)], ids=str)
def test_parts_and_gradients_are_those_of_a_split(batch, used):
    x, weight = make(16, 6, *batch, dtype=torch.float64)
    got = split_run(lambda x, weight: split_linear(x, weight, None, SIZES), x, weight, used=used)
    assert_near(got, split_run(lambda x, weight: F.linear(x, weight).split(SIZES, -1), x, weight, used=used), 1e-13)


@pytest.mark.parametrize("settings", [{"bias": torch.ones(16)}, {"grad": False}], ids=["bias", "no_grad"])
def test_a_split_with_a_bias_or_without_gradients(settings):
    x, weight = make(16, 6, 2, 7)
    with torch.set_grad_enabled(settings.get("grad", True)):
        parts = split_linear(x, weight.requires_grad_(), settings.get("bias"), SIZES)
    for part, want in zip(parts, F.linear(x, weight, settings.get("bias")).split(SIZES, -1), strict=True):
        assert relative_error(part, want) < 2e-6


def test_a_split_under_autocast_is_torchs():
    x, weight = make(16, 6, 2, 7)

    def under_autocast(function):
        def run(x, weight):
            with torch.autocast("cpu", torch.bfloat16):
                return function(x, weight)

        return run

    got = split_run(under_autocast(lambda x, weight: split_linear(x, weight, None, SIZES)), x, weight)
    want = split_run(under_autocast(lambda x, weight: F.linear(x, weight).split(SIZES, -1)), x, weight)
    assert {name: tensor.dtype for name, tensor in got.items()} == {name: tensor.dtype for name, tensor in want.items()}
    assert_near(got, want, 1e-2)


def test_opcheck():
    x, weight = make(16, 6, 9)
    torch.library.opcheck(
        torch.ops.hybridlm.projections.default, (x.requires_grad_(), weight.requires_grad_(), list(SIZES))
    )
    dys = [torch.randn(9, size) for size in SIZES]
    torch.library.opcheck(
        torch.ops.hybridlm.projections_backward.default,
        (dys, x.detach(), weight.detach()),
        test_utils=("test_schema", "test_faketensor"),
    )
