"""A few tokens' projection, read as a batch of smaller matrices: the same numbers as torch's own, and only where it is meant for."""

from __future__ import annotations

import pytest
import torch
from recurrences import relative_error
from torch.nn import functional as F

from hybridlm.ops import linear as ops_linear
from hybridlm.ops.linear import linear

SHAPES = [(1160, 256), (64, 48), (16, 8), (34, 7), (97, 12), (15, 5), (8, 8), (1, 3)]  # outputs with and without a divisor that will do


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


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch was built without MKL: its own linear is used everywhere")
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
