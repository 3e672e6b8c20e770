"""From what a caller gives (ids, documents, padding, cache) to the ``SequenceInfo`` that every layer reads."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm.layers.sequence import SequenceInfo
from hybridlm.model.cache import NO_DOCUMENT, ModelCache


def padding_first(valid: Tensor) -> tuple[Tensor, Tensor]:
    """The order that moves each row's padding to its left and keeps the tokens' own, and its inverse; both (B, T)
    column indices."""
    order = valid.to(torch.int8).argsort(dim=1, stable=True)
    return order, order.argsort(dim=1)


def sequence_info(
    length: int, cache: ModelCache | None, doc_ids: Tensor | None, valid: Tensor | None, like: Tensor
) -> SequenceInfo:
    """Describes ``length`` new columns; doc_ids (B, T) and valid (B, T) as in ``HybridLM.forward``, padding first in
    every row.

    ``like``: the ids, for batch size and device.
    """
    batch, device = like.shape[0], like.device
    past = 0 if cache is None else cache.past
    followed = cache is not None and (cache.ragged or cache.last_doc is not None)
    if doc_ids is None and valid is None and not followed:
        return SequenceInfo.contiguous(batch, length, past, device)
    rank = torch.arange(length, device=device).expand(batch, length)  # among the row's new tokens; negative at padding
    if valid is not None:
        rank = rank - valid.logical_not().sum(1, keepdim=True)
    place = rank if cache is None else rank + cache.next_position.unsqueeze(1)
    open_doc = torch.full_like(rank[:, 0], NO_DOCUMENT) if cache is None else cache.open_doc()
    starts = None
    if doc_ids is not None:
        starts = _starts(doc_ids, rank, open_doc)
        began = torch.where(starts, rank, -1).cummax(1).values  # rank of the newest start; -1: none in this forward
        place = torch.where(began >= 0, rank - began, place)
    elif (
        cache is not None and cache.last_doc is not None
    ):  # the open document continues; an empty row begins document 0
        doc_ids = torch.where(cache.lengths > 0, open_doc, 0).unsqueeze(1).expand(batch, length)
    held = longest = None
    if cache is not None:
        held = cache.lengths.clone() if cache.ragged else None  # the cache changes its own in place
        longest = None if valid is None else int((cache.lengths + valid.sum(1)).max())
    return SequenceInfo(place.clamp_min(0), past, starts, valid, held, doc_ids, longest)


def _starts(doc_ids: Tensor, rank: Tensor, open_doc: Tensor) -> Tensor:
    """(B, T) True where a token's document is not that of the token before it."""
    previous = torch.where(rank == 0, open_doc.unsqueeze(1), doc_ids.roll(1, 1))
    return (doc_ids != previous) & (rank >= 0)
