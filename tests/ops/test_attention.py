"""Attention against loops over heads and queries."""

from __future__ import annotations

import pytest
import torch
from recurrences import assert_near, attend, relative_error
from torch import Tensor

from hybridlm.ops.attention import attention


def make_inputs(
    queries: int, keys: int, heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
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


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 1), (6, 2)])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 7), (2, 7), (3, 3), (7, 7)])
@pytest.mark.parametrize("window", [None, 2])
def test_few_and_many_queries_for_shared_heads(queries, keys, heads, kv_heads, window):
    """Fewer queries than channels fold the heads of a group into the queries; it is the same attention."""
    inputs = make_inputs(queries, keys, heads, kv_heads)
    assert_near(run(attention, inputs, scale=0.5, window=window), run(attend, inputs, scale=0.5, window=window), 1e-12)


@pytest.mark.parametrize(("queries", "heads", "kv_heads"), [(1, 4, 2), (2, 4, 2), (2, 4, 1), (5, 4, 4), (5, 4, 2)])
def test_a_mask_decides_alone(queries, heads, kv_heads):
    """Row by row and query by query, with whatever keys it names, past or future; the same for all heads."""
    inputs = make_inputs(queries, 5, heads, kv_heads)
    mask = torch.rand(2, 1, queries, 5, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[..., 0] = True
    got = run(attention, inputs, scale=0.5, mask=mask)

    def by_query(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        rows = []
        for b in range(2):
            line = [
                attend(q[b : b + 1, t : t + 1], k[b : b + 1, m], v[b : b + 1, m], scale)
                for t, m in enumerate(mask[b, 0])
            ]
            rows.append(torch.cat(line, 1))
        return torch.cat(rows)

    assert_near(got, run(by_query, inputs, scale=0.5), 1e-12)


@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.parametrize(("queries", "kv_heads"), [(1, 2), (2, 1), (6, 4), (6, 2)])
def test_values_may_have_another_width(queries, kv_heads, width):
    q, k, _ = make_inputs(queries, 6, 4, kv_heads)
    v = torch.randn(2, 6, kv_heads, width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert_near(run(attention, (q, k, v), scale=0.5), run(attend, (q, k, v), scale=0.5), 1e-12)


@pytest.mark.parametrize(("queries", "width"), [(1, 3), (1, 4), (2, 3), (6, 3), (6, 4)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_softmax_is_wide(queries, width, dtype):
    """Many nearly equal scores: probabilities summed in the narrow dtype would lose most of their digits. All kernels
    are met: fused, with a mask, with values of another width."""
    g = torch.Generator().manual_seed(0)
    q, k = (
        torch.randn(1, queries, 2, 3, generator=g).to(dtype),
        (1e-2 * torch.randn(1, 3000, 2, 3, generator=g)).to(dtype),
    )
    v = (1 + torch.randn(1, 3000, 2, width, generator=g).abs()).to(dtype)
    want = attend(*[tensor.double() for tensor in (q, k, v)], scale=1.0)
    assert relative_error(attention(q, k, v, scale=1.0), want) < {torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
