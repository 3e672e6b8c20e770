"""Padding: how a row's past and its new tokens are joined where padding stands between them, and a text cut into whole
chunks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def after_padding(state: Tensor, new: Tensor, padding: Tensor | None) -> Tensor:
    """(B, K, ...) of a row's past followed by its new (B, T, ...): (B, K + T, ...), newest last.

    ``padding`` (B,) columns at the left of ``new`` are not tokens: the past moves right, up to the first token, and
    what is before it is zero. The last K columns are the row's newest, whatever the padding.
    """
    joined = torch.cat((state.to(new.dtype), new), 1)
    if padding is None:
        return joined
    width = state.shape[1]
    columns = torch.arange(joined.shape[1], device=new.device).unsqueeze(0)
    shift = padding.unsqueeze(1)
    tail = (1,) * (new.dim() - 2)
    source = torch.where(columns < width + shift, (columns - shift).clamp_min(0), columns)
    source = source.view(*source.shape, *tail).expand(-1, -1, *new.shape[2:])
    return joined.gather(1, source).masked_fill((columns < shift).view(len(source), -1, *tail), 0.0)


def in_chunks(tensor: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
    """(B, T, ...) to (B, chunks, Q, ...) in ``dtype``, padded with zeros at the end; a view where it can be.

    For every scan a token of zeros is none: it neither decays the state nor writes into it.
    """
    pad = -tensor.shape[1] % chunk
    tensor = tensor.to(dtype)
    if pad:
        tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, pad))
    chunks: Tensor = tensor.unflatten(1, (-1, chunk))
    return chunks
