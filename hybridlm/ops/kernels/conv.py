"""The short causal convolution through causal-conv1d (Dao)."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm.ops.kernels.graph import outside_graphs
from hybridlm.ops.norm import as_dtype


def document_index(starts: Tensor) -> Tensor:
    """(B, T) int32: documents that began in the row up to each token; 0 as long as what stood before the row goes
    on."""
    return starts.cumsum(1, dtype=torch.int32)


def _aligned(rows: Tensor) -> Tensor:
    """(B, T, C) as it is where the kernel can read 8 numbers at once in it, else a copy. It checks x, but of a state,
    which may be a view of the projection before, only that channels are neighbours: reading it would end with a
    misaligned address."""
    strides = (*rows.stride()[:2], rows.storage_offset())
    return rows.contiguous() if rows.stride(2) != 1 or any(stride % 8 for stride in strides) else rows


@outside_graphs
def kernel_conv(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor | None, positions: Tensor | None) -> Tensor:
    """``ops.conv.causal_conv``'s output (B, T, C) for what ``conv_refusal`` lets through; weight and bias may be wider
    than x.

    The kernel reads (B, C, T) with channels next to each other in memory, which is our (B, T, C) seen from the side,
    and rows that begin at multiples of 8 numbers.
    """
    from causal_conv1d import causal_conv1d_fn

    x = _aligned(x)
    out: Tensor = causal_conv1d_fn(
        x.transpose(1, 2),
        weight[:, 0],
        bias=as_dtype(bias, weight.dtype),
        seq_idx=None if positions is None else document_index(positions == 0),
        initial_states=None if state is None else _aligned(as_dtype(state, x.dtype)).transpose(1, 2),
        activation="silu",
    )
    return out.transpose(1, 2)
