"""The projection and the norm of one token."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm.ops.linear import linear, matrices


class Projection:
    """``x @ weight^T`` for x (B, I): what ``ops.linear`` does, with what hangs on the weight alone worked out
    before."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        outputs, inputs = weight.shape
        shape = matrices(weight, 1)
        self._matrices = None if shape is None else weight.view(shape)
        self._vector = (
            None if shape is None else ((shape[0], inputs, 1), (0, 1, inputs))
        )  # sizes and strides of x, once for each matrix
        self._outputs = outputs

    def __call__(self, x: Tensor) -> Tensor:
        """(B, I), contiguous, to (B, O)."""
        if self._matrices is not None and self._vector is not None and x.shape[0] == 1:
            return torch.bmm(self._matrices, x.as_strided(*self._vector, x.storage_offset())).view(1, self._outputs)
        return linear(x, self.weight)


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``ops.norm.rms_norm`` in one dtype: (..., C) to the same."""
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    return (x * torch.add(eps, squares, alpha=1 / x.shape[-1]).rsqrt_()).mul_(weight)
