"""The gate's rows about sequences: however a text is cut, padded or packed, every token gets the same logits."""

from __future__ import annotations

import random
from itertools import pairwise

import torch
from torch import Tensor

from hybridlm.eval.gate_subject import VOCAB, Subject, Worst, compare_gradients, logits_of, relative

_VISIBLE = 1e-6  # smaller changes count as none


def causality(subject: Subject) -> Worst:
    """Changing a token must change its own logits and none before it."""
    worst, chunk, tokens = Worst(), subject.plan.chunk, subject.plan.tokens
    base = subject.text[:1]
    places = sorted({place for place in (chunk - 1, chunk, 2 * chunk, tokens - 2) if 0 < place < tokens})
    changed = base.repeat(len(places), 1)
    for row, place in enumerate(places):
        changed[row, place] = (changed[row, place] + 1) % VOCAB
    logits, whole = subject.logits(changed), subject.whole[:1]
    for row, place in enumerate(places):
        worst.see(relative(logits[row : row + 1, :place], whole[:, :place]), f"tokens before token {place} see it")
        if relative(logits[row : row + 1, place], whole[:, place]) < _VISIBLE:
            worst.see(torch.inf, f"token {place} does not see itself")
    return worst


def in_pieces(subject: Subject, ids: Tensor, cuts: list[int], documents: Tensor | None = None) -> Tensor:
    """All logits of ``ids`` through one cache, the text cut in front of the tokens ``cuts``."""
    cache = subject.model.new_cache(ids.shape[0], ids.shape[1])
    parts = []
    with torch.no_grad():
        for start, end in pairwise([0, *cuts, ids.shape[1]]):
            piece = None if documents is None else documents[:, start:end]
            parts.append(logits_of(subject.model(ids[:, start:end], cache=cache, doc_ids=piece)))
    return torch.cat(parts, 1)


def decode(subject: Subject) -> Worst:
    """Token by token from nothing, and after a prefill that ends inside a chunk."""
    worst, tokens = Worst(), subject.plan.tokens
    steps = 6 * subject.plan.rows  # each reads all weights
    starts = {"after a prefill": list(range(max(1, tokens - steps), tokens)), "from the first token": list(range(1, 8))}
    for name, cuts in starts.items():
        text = subject.text if name == "after a prefill" else subject.text[:, :8]
        found, expected = in_pieces(subject, text, cuts), subject.whole[:, : text.shape[1]]
        worst.see(relative(found[:, : cuts[0]], expected[:, : cuts[0]]), f"{name}: the prefill itself")
        for t in range(cuts[0], text.shape[1]):
            worst.see(relative(found[:, t], expected[:, t]), f"{name}: token {t}")
    return worst


def chunked_prefill(subject: Subject) -> Worst:
    """Pieces of random lengths, one of a single token among them, one across a chunk's end, and one cut at it."""
    worst, tokens, chunk = Worst(), subject.plan.tokens, subject.plan.chunk
    draw = random.Random(subject.seed)
    for turn in range(2):
        single = draw.randrange(1, tokens - 1)
        cuts = {single, single + 1, *draw.sample(range(1, tokens), 3), *([chunk] if turn else [])}
        across = [cut for cut in sorted(cuts) if turn or not chunk - 2 <= cut <= chunk + 2]
        found = in_pieces(subject, subject.text, across)
        for start, end in pairwise([0, *across, tokens]):
            worst.see(
                relative(found[:, start:end], subject.whole[:, start:end]),
                f"tokens {start} to {end - 1} of cuts {across}",
            )
    return worst


def left_padding(subject: Subject) -> Worst:
    """Rows of different lengths, one of them empty, padded on the left: prefill, then decode in which rows end and
    continue."""
    worst, chunk = Worst(), subject.plan.chunk
    wide = min(subject.plan.tokens, 2 * chunk + 3)
    lengths = [wide, min(chunk + 2, wide), 1, 0]
    steps = torch.tensor(
        [[1, 1, 1, 1], [1, 0, 1, 0], [0, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool
    )  # (row, step) False: padding
    ids = subject.ids(len(lengths), wide + steps.shape[1], 4)
    left = torch.arange(wide) >= wide - torch.tensor(lengths).unsqueeze(1)
    valid = torch.cat((left, steps), 1)
    with torch.no_grad():
        whole = logits_of(subject.model(ids, valid=valid))
        cache = subject.model.new_cache(len(lengths), valid.shape[1])
        parts = [logits_of(subject.model(ids[:, :wide], cache=cache, valid=left))]
        for step in range(steps.shape[1]):
            column = slice(wide + step, wide + step + 1)
            mask = None if bool(steps[:, step].all()) else valid[:, column]
            parts.append(logits_of(subject.model(ids[:, column], cache=cache, valid=mask)))
        pieces = torch.cat(parts, 1)
    alone = [subject.logits(ids[row : row + 1, valid[row]]) for row in range(len(lengths))]
    for name, logits in (("one forward", whole), ("prefill and decode", pieces)):
        if not bool(logits.isfinite().all()):
            worst.see(torch.inf, f"{name}: logits at padding are not finite")
        for row, length in enumerate(lengths):
            worst.see(relative(logits[row : row + 1, valid[row]], alone[row]), f"{name}: the row of {length} tokens")
    return worst


def documents(subject: Subject) -> Worst:
    """A packed text against each of its documents alone: logits, loss, every gradient; and a change in
    one document does not reach another."""
    worst, model = Worst(), subject.model
    ids, targets, doc_ids = subject.packed
    with torch.no_grad():
        packed = logits_of(model(ids, doc_ids=doc_ids))
    bounds = [0, *(int(place) + 1 for place in (doc_ids[0, 1:] != doc_ids[0, :-1]).nonzero()), ids.shape[1]]
    spans = list(pairwise(bounds))
    total: dict[str, Tensor | None] = {}
    loss_alone = torch.zeros((), dtype=torch.float64)
    for start, end in spans:
        part = ids[:, start:end]
        worst.see(relative(packed[:, start:end], subject.logits(part)), f"logits of the document at {start}")
        loss, grads = subject.gradients(model(part, targets=targets[:, start:end]), with_aux=False)
        loss_alone += loss
        for name, grad in grads.items():
            before = total.get(name)
            total[name] = grad if before is None else before if grad is None else before.add_(grad)
    loss, grads = subject.packed_gradients
    worst.see(relative(loss, loss_alone), "loss")
    compare_gradients(grads, total, worst, "packed")

    cuts = [bounds[1] - 1, bounds[2], bounds[3] + 1, ids.shape[1] - 1]  # inside a document and at its end
    worst.see(
        relative(in_pieces(subject, ids, sorted(set(cuts)), doc_ids), packed),
        "the packed text in pieces, through the cache",
    )
    start, end = spans[-2] if len(spans) > 1 else spans[0]
    changed = ids.clone()
    changed[:, start:end] = (changed[:, start:end] + 1) % VOCAB
    with torch.no_grad():
        other = logits_of(model(changed, doc_ids=doc_ids))
    for first, last in spans:
        if (first, last) == (start, end):
            if relative(other[:, first:last], packed[:, first:last]) < _VISIBLE:
                worst.see(torch.inf, f"the document at {first} does not see its own change")
        else:
            worst.see(
                relative(other[:, first:last], packed[:, first:last]), f"the document at {first} sees that at {start}"
            )
    return worst
