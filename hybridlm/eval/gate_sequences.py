"""The gate's checks of sequences: however a text is cut, padded or packed, every token gets the same logits."""

from __future__ import annotations

import random
from itertools import pairwise

import torch
from torch import Tensor

from hybridlm.eval.gate_subject import VOCAB, Findings, Gradients, Subject, compare_gradients, relative

_VISIBLE = 1e-6  # smaller changes count as none


def causality(subject: Subject) -> Findings:
    """Changing a token must change its own logits and none before it."""
    chunk, tokens = subject.plan.chunk, subject.plan.tokens
    places = sorted({place for place in (chunk - 1, chunk, 2 * chunk, tokens - 2) if 0 < place < tokens})
    whole, changed = subject.whole[0], subject.text[:1].repeat(len(places), 1)
    changed[range(len(places)), places] = (changed[0, places] + 1) % VOCAB
    for place, logits in zip(places, subject.logits(changed), strict=True):
        yield relative(logits[:place], whole[:place]), f"tokens before token {place} see it"
        yield _unless_visible(logits[place], whole[place], f"token {place} does not see itself")


def _unless_visible(changed: Tensor, before: Tensor, unseen: str) -> tuple[float, str]:
    return torch.inf if relative(changed, before) < _VISIBLE else 0.0, unseen


def in_pieces(subject: Subject, ids: Tensor, cuts: list[int], docs: Tensor | None = None) -> Tensor:
    """All logits of ``ids`` through one cache, the text cut in front of the tokens ``cuts``."""
    cache = subject.model.new_cache(ids.shape[0], ids.shape[1])
    bounds = pairwise([0, *cuts, ids.shape[1]])
    return torch.cat([subject.logits(ids[:, a:b], cache, None if docs is None else docs[:, a:b]) for a, b in bounds], 1)


def decode(subject: Subject) -> Findings:
    """Token by token from nothing, and after a prefill that ends inside a chunk."""
    tokens = subject.plan.tokens
    starts = {
        "after a prefill": range(max(1, tokens - 12), tokens),  # each step reads all weights
        "from the first token": range(1, 8),
    }
    for name, cuts in starts.items():
        found = in_pieces(subject, subject.text[:, : cuts.stop], list(cuts))
        for first, end in pairwise([0, *cuts, cuts.stop]):
            yield relative(found[:, first:end], subject.whole[:, first:end]), f"{name}: tokens {first} to {end - 1}"


def chunked_prefill(subject: Subject) -> Findings:
    """Pieces of random lengths, one of a single token among them, one across a chunk's end, and one cut at it."""
    tokens, chunk = subject.plan.tokens, subject.plan.chunk
    draw = random.Random(subject.seed)
    for turn in range(2):
        single = draw.randrange(1, tokens - 1)
        cuts = {single, single + 1, *draw.sample(range(1, tokens), 3), *([chunk] if turn else [])}
        across = [cut for cut in sorted(cuts) if turn or not chunk - 2 <= cut <= chunk + 2]
        found = in_pieces(subject, subject.text, across)
        for start, end in pairwise([0, *across, tokens]):
            error = relative(found[:, start:end], subject.whole[:, start:end])
            yield error, f"tokens {start} to {end - 1} of cuts {across}"


def left_padding(subject: Subject) -> Findings:
    """Rows of different lengths, one of them empty, padded on the left: prefill, then decode in which rows end and
    continue."""
    wide = min(subject.plan.tokens, 2 * subject.plan.chunk + 3)
    lengths = torch.tensor([wide, min(subject.plan.chunk + 2, wide), 1, 0])
    steps = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 1, 1, 1], [1, 1, 1, 1]]).bool()  # (row, step) False: padding
    valid = torch.cat((torch.arange(wide) >= wide - lengths.unsqueeze(1), steps), 1)
    rows, columns = valid.shape
    ids, cache = subject.ids(rows, columns, 4), subject.model.new_cache(rows, columns)
    parts = []
    for start, end in pairwise([0, *range(wide, columns + 1)]):
        mask = valid[:, start:end]
        parts.append(subject.logits(ids[:, start:end], cache, valid=None if start and bool(mask.all()) else mask))
    for name, logits in (
        ("one forward", subject.logits(ids, valid=valid)),
        ("prefill and decode", torch.cat(parts, 1)),
    ):
        yield 0.0 if bool(logits.isfinite().all()) else torch.inf, f"{name}: logits at padding are not finite"
        for row, kept in enumerate(valid):
            alone = subject.logits(ids[row : row + 1, kept])
            yield relative(logits[row : row + 1, kept], alone), f"{name}: the row of {lengths[row]} tokens"


def documents(subject: Subject) -> Findings:
    """A packed text against each of its documents alone: logits, loss, every gradient; and a change in one document
    does not reach another."""
    ids, targets, docs = subject.packed
    packed = subject.logits(ids, docs=docs)
    bounds = [0, *(int(place) + 1 for place in docs.diff()[0].nonzero()), ids.shape[1]]
    spans = list(pairwise(bounds))
    loss_alone, total = torch.zeros((), dtype=torch.float64), Gradients()
    for start, end in spans:
        part = ids[:, start:end]
        yield relative(packed[:, start:end], subject.logits(part)), f"logits of the document at {start}"
        loss, grads = subject.gradients(part, targets[:, start:end], with_aux=False)
        loss_alone += loss
        for name, grad in grads.items():
            before = total.get(name)
            total[name] = before if grad is None else grad if before is None else before.add_(grad)
    loss, grads = subject.gradients(ids, targets, docs, with_aux=False)
    yield relative(loss, loss_alone), "loss"
    yield from compare_gradients(grads, total, "packed")

    cuts = {bounds[1] - 1, bounds[2], bounds[3] + 1, ids.shape[1] - 1}  # inside a document and at its end
    yield relative(in_pieces(subject, ids, sorted(cuts), docs), packed), "the packed text in pieces, through the cache"
    start, end = spans[-2]
    changed = ids.clone()
    changed[:, start:end] = (changed[:, start:end] + 1) % VOCAB
    other = subject.logits(changed, docs=docs)
    for first, last in spans:
        if first == start:
            unseen = f"the document at {first} does not see its own change"
            yield _unless_visible(other[:, first:last], packed[:, first:last], unseen)
        else:
            error = relative(other[:, first:last], packed[:, first:last])
            yield error, f"the document at {first} sees that at {start}"
