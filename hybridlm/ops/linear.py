"""``x @ weight^T``, faster than torch's own on a CPU for a few tokens and for an output that is split.

Decoding is bound by reading the weights. MKL's matrix-vector product, which torch uses for one token, reads a weight at
a third to three quarters of the rate at which it reads the same weight as a batch of matrices of fewer rows
(benchmarks/results/linear.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from hybridlm.ops.dispatch import autocast_off, autocast_on, gradient_wanted, new_like
from hybridlm.ops.norm import as_dtype

_TOKENS = 4  # no gain from twice as many on
_WIDEST = 1024  # inputs; MKL reads longer rows well
_MKL = torch.backends.mkl.is_available()


@lru_cache
def _matrices(outputs: int, inputs: int, tokens: int) -> tuple[int, int, int] | None:
    """The batch of matrices (n, rows, inputs) to read a weight as, rows being the most from 8 to 256 that divide its
    outputs and leave several; None where that does not pay."""
    if tokens > _TOKENS or inputs > _WIDEST:
        return None
    rows = next((rows for rows in range(min(256, outputs // 2), 7, -1) if outputs % rows == 0), None)
    return None if rows is None else (outputs // rows, rows, inputs)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight^T + bias``. x: (..., I); weight: (O, I); bias: (O,) or None. Returns (..., O)."""
    outputs, inputs = weight.shape
    tokens = x.numel() // inputs
    shape = _matrices(outputs, inputs, tokens)
    if shape is None or not _readable(x, weight) or gradient_wanted(x, weight, bias) or autocast_on(x):
        return F.linear(x, weight, bias)
    # Transposed, not reshaped: the strides tell torch that MKL can take a column as it is.
    vectors = x.reshape(1, tokens, inputs).transpose(1, 2).expand(shape[0], inputs, tokens)
    y = torch.bmm(weight.view(shape), vectors)
    y = y.view(*x.shape[:-1], outputs) if tokens == 1 else y.view(outputs, tokens).t().reshape(*x.shape[:-1], outputs)
    return y if bias is None else y + bias


def linear_of_one(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """``linear`` of few tokens and a weight that no longer changes, without gradients or autocast: a function from
    (B, I), contiguous, to (B, O). What depends on the weight alone is worked out here."""
    outputs, inputs = weight.shape
    shape = _matrices(outputs, inputs, 1) if _readable(weight, weight) else None
    if shape is None:
        return lambda x: linear(x, weight)
    matrices, size, stride = weight.view(shape), (shape[0], inputs, 1), (0, 1, inputs)

    def product(x: Tensor) -> Tensor:
        if len(x) > 1:
            return linear(x, weight)
        return torch.bmm(matrices, x.as_strided(size, stride, x.storage_offset())).view(1, outputs)

    return product


def _readable(x: Tensor, weight: Tensor) -> bool:
    return _MKL and x.dtype == weight.dtype == torch.float32 and x.is_cpu and weight.is_contiguous()


@torch.library.custom_op("hybridlm::projections", mutates_args=())
def _projections(x: Tensor, weight: Tensor, sizes: list[int]) -> list[Tensor]:
    with autocast_off(x):
        return [torch.mm(x, rows.t()) for rows in weight.split(sizes)]


_projections.register_fake(lambda x, weight, sizes: [x.new_empty(len(x), size) for size in sizes])


@torch.library.custom_op("hybridlm::projections_backward", mutates_args=())
def _projections_backward(dys: list[Tensor], x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    dx, dweight, first = torch.zeros_like(x), torch.empty_like(weight), 0
    with autocast_off(x):
        for dy in dys:
            rows = slice(first, first + dy.shape[1])
            dx.addmm_(dy, weight[rows])
            torch.mm(dy.t(), x, out=dweight[rows])
            first = rows.stop
    return dx, dweight


_projections_backward.register_fake(lambda dys, x, weight: tuple(new_like(x, weight)))


def _setup(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor, list[int]], output: list[Tensor]
) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.sizes = inputs[2]  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, dys: list[Tensor | None]) -> tuple[Tensor, Tensor, None]:
    x, weight = ctx.saved_tensors  # type: ignore[attr-defined]
    sizes = ctx.sizes  # type: ignore[attr-defined]
    given = [x.new_zeros(len(x), size) if dy is None else dy for dy, size in zip(dys, sizes, strict=True)]
    return (*_projections_backward(given, x, weight), None)


_projections.register_autograd(_backward, setup_context=_setup)


def split_linear(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sequence[int]) -> Sequence[Tensor]:
    """``linear(x, weight, bias).split(sizes, -1)``. On a CPU its backward takes the gradients as they come, where a
    split's would first copy them side by side."""
    if bias is not None or not x.is_cpu or not gradient_wanted(x, weight):
        return linear(x, weight, bias).split_with_sizes(list(sizes), -1)
    if autocast_on(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = as_dtype(x, dtype), as_dtype(weight, dtype)
    parts: list[Tensor] = _projections(x.flatten(0, -2), weight, list(sizes))
    return [part.view(*x.shape[:-1], -1) for part in parts]
