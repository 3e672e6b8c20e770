"""Attention against loops over heads and queries."""

from __future__ import annotations

import pytest
import torch
from recurrences import assert_near, attend, relative_error
from torch import Tensor

from hybridlm.ops.attention import attention


def make_inputs(queries: int, keys: int, heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    shapes = [(2, queries, heads, 3), (2, keys, kv_heads, 3), (2, keys, kv_heads, 3)]
    return tuple(torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes)


def run(function, inputs: tuple[Tensor, ...], **settings) -> dict[str, Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    out = function(*leaves, **settings)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad((out * weights).sum(), leaves)
    return {"out": out, "dq": grads[0], "dk": grads[1], "dv": grads[2]}


@pytest.mark.parametrize("window", [None, 1, 2, 3, 7, 8, 100])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 7), (2, 7), (7, 7)])
def test_window_and_prefix(queries, keys, window):
    """The queries are the last of the keys' positions; the window counts the token itself."""
    inputs = make_inputs(queries, keys)
    assert_near(run(attention, inputs, scale=0.7, window=window), run(attend, inputs, scale=0.7, window=window), 1e-12)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (4, 1), (6, 2)])
def test_heads_share_keys_in_order(heads, kv_heads):
    inputs = make_inputs(5, 5, heads, kv_heads)
    assert_near(run(attention, inputs, scale=0.5), run(attend, inputs, scale=0.5), 1e-12)


@pytest.mark.parametrize("window", [None, 3])
def test_no_look_ahead(window):
    """Keys and values after a query do not touch its output, not even by rounding."""
    q, k, v = make_inputs(6, 6)
    out = attention(q, k, v, scale=0.5, window=window)
    k[:, 4:], v[:, 4:] = 1e3, -1e3
    changed = attention(q, k, v, scale=0.5, window=window)
    assert torch.equal(changed[:, :4], out[:, :4])
    assert not torch.allclose(changed[:, 4:], out[:, 4:])


def test_bfloat16():
    inputs = make_inputs(6, 6, dtype=torch.bfloat16)
    out = attention(*inputs, scale=0.5)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, attend(*[tensor.double() for tensor in inputs], scale=0.5)) < 1e-2
