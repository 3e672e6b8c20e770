"""The gate's numeric checks: however a text is cut, padded or packed, every token gets the same logits; recomputed
activations; gradients against differences of the loss; routing."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor
from torch.func import functional_call

from hybridlm.eval.gate_subject import VOCAB, Findings, Gradients, Subject, compare_gradients, relative, total_loss
from hybridlm.model.block import Block

_STEPS = (3e-5, 2e-6, 2e-7)  # of the difference quotient, as shares of each parameter's size
_GOOD = 1e-7  # an error after which no shorter step is tried
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
    return math.inf if relative(changed, before) < _VISIBLE else 0.0, unseen


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
        yield 0.0 if bool(logits.isfinite().all()) else math.inf, f"{name}: logits at padding are not finite"
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


def checkpointing(subject: Subject) -> Findings:
    """Checkpointed blocks against blocks that keep their activations."""
    kept_loss, kept = subject.gradients(*subject.packed, with_aux=True)
    subject.model.checkpoint_blocks = 1
    try:
        loss, recomputed = subject.gradients(*subject.packed, with_aux=True)
    finally:
        subject.model.checkpoint_blocks = 0
    yield relative(loss, kept_loss), "loss"
    yield from compare_gradients(recomputed, kept, "recomputed")


def gradients(subject: Subject) -> Findings:
    """Every parameter has a finite gradient; one that is zero everywhere belongs to a parameter that the loss does not
    depend on."""
    for name, grad in subject.plain_gradients.items():
        if grad is None:
            yield math.inf, f"{name} gets no gradient"
        elif not bool(grad.isfinite().all()):
            yield math.inf, f"the gradient of {name} is not finite"
        elif bool(grad.any()):
            yield 0.0, name
        else:
            before, moved = (_loss(subject, {name: _drawn(grad, subject.generator(7))}, step) for step in (0, 1e-3))
            yield abs(moved / before - 1), f"the gradient of {name} is zero, but the loss depends on it"


def derivative(subject: Subject) -> Findings:
    """The loss's derivative along a random direction through all parameters: autograd against a central difference."""
    grads = {name: grad for name, grad in subject.plain_gradients.items() if grad is not None}
    direction = _direction(subject, grads)
    products = [grads[name] * direction[name] for name in grads]
    exact = sum(float(product.sum()) for product in products)
    scale = max(abs(exact), math.sqrt(sum(float(product.square().sum()) for product in products)), 1e-30)
    found = []
    for step in _STEPS:  # a step may cross the point where a router changes its mind: then a shorter step is tried
        quotient = (_loss(subject, direction, step) - _loss(subject, direction, -step)) / (2 * step)
        error = abs(quotient - exact) / scale
        found.append((math.inf if math.isnan(error) else error, f"autograd {exact:.6g}, difference {quotient:.6g}"))
        if error <= _GOOD:
            break
    yield min(found)


def _loss(subject: Subject, direction: Mapping[str, Tensor], step: float) -> float:
    """Of the first plain text, with the parameters moved by ``step`` along a direction."""
    ids, targets = subject.plain
    with torch.no_grad():
        moved = {name: subject.model.get_parameter(name) + step * along for name, along in direction.items()}
        return float(total_loss(functional_call(subject.model, moved, (ids,), {"targets": targets})))


def _direction(subject: Subject, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A random direction in which every parameter has about the same share, so that none hides behind a larger one."""
    generator = subject.generator(6)
    size = {name: float(subject.model.get_parameter(name).detach().square().mean().sqrt()) for name in grads}
    share = {name: size[name] * float(grad.norm()) for name, grad in grads.items()}
    usual = sorted(share.values())[len(share) // 2]
    return {
        name: _drawn(grad, generator) * size[name] * (min(1.0, usual / share[name]) if share[name] > 0 else 1.0)
        for name, grad in grads.items()
    }


def _drawn(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.empty(like.shape).uniform_(-1.0, 1.0, generator=generator).to(like.dtype)


def experts(subject: Subject) -> Findings:
    """Padding reaches no expert and no statistic; each token reaches top_k; a uniform router has a balance loss of 1.
    Nothing where no layer has experts."""
    x = torch.empty(2, subject.plan.tokens, subject.model.config.d_model, dtype=torch.float64)
    x.uniform_(-1.0, 1.0, generator=subject.generator(8))
    valid = torch.ones(x.shape[:2], dtype=torch.bool)
    valid[0, :7] = False
    for i, block in enumerate(subject.model.blocks):
        ffn = cast(Block, block).ffn
        if ffn is None or not ffn.n_experts:
            continue
        routers = {name: p for name, p in ffn.named_parameters() if p.shape == (ffn.n_experts, x.shape[-1])}
        with torch.no_grad():
            padded, stats = ffn(x, valid)
            alone, bare = ffn(x[valid].unsqueeze(0))
            other = ffn(x.masked_fill(~valid.unsqueeze(-1), 3.0), valid)[0]
            zeros = {name: torch.zeros_like(router) for name, router in routers.items()}
            uniform = functional_call(ffn, zeros, (x,))[1]
        yield relative(padded[valid], alone[0]), f"layer {i}: outputs next to padding"
        for name, with_padding, without in zip(stats._fields, stats, bare, strict=True):
            yield relative(with_padding.double(), without.double()), f"layer {i}: {name} counts padding"
        places = ffn.top_k * int(valid.sum())
        yield abs(float(stats.counts.sum()) / places - 1), f"layer {i}: the router should hand out {places} places"
        yield relative(other[valid], padded[valid]), f"layer {i}: the content of padding reaches tokens"
        if len(routers) != 1:
            yield math.inf, f"layer {i}: {len(routers)} parameters look like the router's weight"
        balance = float(uniform.balance_loss)
        yield abs(balance - 1.0), f"layer {i}: balance loss {balance:.6g} of uniform routing"
