"""``x @ weight^T`` for a few tokens, faster than torch's own on a CPU.

Decoding reads every weight for a handful of numbers, so it takes the time of reading them. MKL's product of a matrix and a vector, which
is what torch makes of one token, reads at a third of what the same matrix reads at as a batch of matrices of fewer rows
(benchmarks/results/linear.md).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from hybridlm.ops.modes import autocast_on, gradient_wanted

_TOKENS = 4  # from twice as many on there is nothing to gain
_WIDEST = 1024  # inputs; of wider ones MKL reads long rows well by itself
_MKL = torch.backends.mkl.is_available()


@lru_cache
def _matrices(outputs: int, inputs: int, tokens: int) -> tuple[int, int, int] | None:
    """The batch of matrices (n, rows, inputs) to read a weight as, rows being the most from 8 to 256 that divide its outputs and leave
    several; None where that does not pay."""
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


def _readable(x: Tensor, weight: Tensor) -> bool:
    return _MKL and x.dtype == weight.dtype == torch.float32 and x.is_cpu and weight.is_contiguous()
