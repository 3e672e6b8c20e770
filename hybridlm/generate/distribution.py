"""From logits to the next token, by the options of a ``Sampling``."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hybridlm.generate.sampling import Sampling

_DRAW_BITS = 48  # fewer than float64's 53, so that a draw times a total is below it
_COLDEST, _HOTTEST = 1e-30, 1e30  # float32 cannot divide by temperatures beyond these, which change nothing more
_CERTAIN = 45.0  # by how much a scaled logit leads where all others together are less likely than any draw is small


class TokenLogprob(NamedTuple):
    """Natural log of a token's probability under the model itself, before any sampling option.

    top: the most likely tokens at that position and their log-probabilities, the most likely first.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def draw(seed: int, place: int) -> float:
    """A number in [0, 1) that depends only on ``seed`` and ``place``, the number of tokens before the one to draw.

    A hash, not a stateful generator: a row that is branched, saved or moved to another batch keeps its draws.
    """
    digest = hashlib.blake2b(f"{seed} {place}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> (64 - _DRAW_BITS)) / (1 << _DRAW_BITS)


def adjusted(logits: Tensor, sampling: Sampling, rows: Sequence[Sequence[int]], new: Sequence[int]) -> Tensor:
    """``logits`` (B, V) with bias and penalties. rows: the ids of each row; new: how many of them, the last ones, were
    generated. Not in place."""
    if sampling.logit_bias:
        ids = torch.tensor(list(sampling.logit_bias), device=logits.device)
        logits = logits.index_add(1, ids, logits.new_tensor(list(sampling.logit_bias.values())).expand(len(logits), -1))
    if not sampling.penalises:
        return logits
    logits, penalty = logits.clone(), sampling.repetition_penalty
    for row, held, count in zip(logits, rows, new, strict=True):
        seen = torch.tensor(held, dtype=torch.long, device=row.device)
        own, counts = seen[len(held) - count :].unique(return_counts=True)
        seen = seen.unique()
        row[seen] = torch.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
        row[own] -= sampling.presence_penalty + sampling.frequency_penalty * counts.to(row.dtype)
    return logits


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution (B, V) to draw from, in at least float32; temperature above 0."""
    logits = _scaled(logits, sampling)
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    probability = logits.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probability.sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= sampling.top_p  # those before it are enough; the first always stays
        probability = probability.masked_fill(torch.zeros_like(outside).scatter_(1, order, outside), 0.0)
    if sampling.min_p > 0:
        probability = probability.masked_fill(probability < sampling.min_p * probability.amax(-1, keepdim=True), 0.0)
    return probability / probability.sum(-1, keepdim=True)


def _scaled(logits: Tensor, sampling: Sampling) -> Tensor:
    """Divided by the temperature, in at least float32; the largest becomes 0, so that none overflows."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (logits - logits.amax(-1, keepdim=True)) / _divisor(sampling)


def _divisor(sampling: Sampling) -> float:
    return min(max(sampling.temperature, _COLDEST), _HOTTEST)


def chosen(logits: Tensor, sampling: Sampling, draws: Sequence[float]) -> Tensor:
    """The next id of each row, (B,): the most likely if temperature is 0, else the first id at which the cumulative
    probability, in order of the ids, exceeds the row's draw.

    logits: (B, V), adjusted. draws: one number in [0, 1) per row. Rounding of the logits changes the token only if a
    draw falls within that rounding of a border; ``settled`` tells.
    """
    return logits.argmax(-1) if sampling.temperature == 0 else _drawn(probabilities(logits, sampling), draws)[0]


def _drawn(probability: Tensor, draws: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """The id (B,) of each row, the cumulative probability (B, V), and the place (B, 1) of the draw in it."""
    running = probability.double().cumsum(-1)
    target = torch.tensor(draws, dtype=torch.float64, device=running.device).unsqueeze(1) * running[:, -1:]
    return torch.searchsorted(running, target, right=True).squeeze(1), running, target


def settled(logits: Tensor, sampling: Sampling, draws: Sequence[float], noise: Tensor) -> tuple[Tensor, Tensor]:
    """What ``chosen`` gives, and (B,) True where it would give the same for any logits that lie within ``noise`` (B,)
    of these.

    A draw must lie further from the borders of its token than the noise and the tokens of which it is open whether
    top_k, top_p and min_p keep them can move these.
    """
    penalty = sampling.repetition_penalty
    noise = noise * max(penalty, 1 / penalty)
    if sampling.temperature == 0:
        # Twice the noise of a difference: here nothing cancels.
        return logits.argmax(-1), _lead(logits) > 4 * noise
    relative = (noise / _divisor(sampling)).double()
    kept = probabilities(logits, sampling)
    ids, running, target = _drawn(kept, draws)
    whole, target = running[:, -1], target.squeeze(1) / running[:, -1]
    borders = running.gather(1, torch.stack(((ids - 1).clamp_min(0), ids), 1)) / whole.unsqueeze(1)
    before, behind = torch.where(ids > 0, borders[:, 0], 0.0), borders[:, 1]
    odds = (2 * relative.clamp_max(1.0)).exp()  # by what the odds of a cumulative probability may change
    highest, lowest = before * odds / (before * odds + 1 - before), behind / (behind + (1 - behind) * odds)
    open_mass = torch.zeros_like(relative)
    if (sampling.top_k, sampling.top_p, sampling.min_p) != (None, 1.0, 0.0):
        likely = _scaled(logits, sampling).softmax(-1).double()
        open_mass = _open(likely, kept > 0, sampling, relative.clamp_max(1.0))
    # The first token that is kept has no border before it, and the last none behind it.
    far_before = (target > highest + open_mass) | ((before <= 0) & (open_mass == 0))
    far_behind = (target < lowest - open_mass) | ((behind >= 1) & (open_mass == 0))
    sure = far_before & far_behind
    if bool((relative >= 1).any()):  # beyond what is compared above: only a token that is certain is settled
        sure = torch.where(relative < 1, sure, _lead(logits) > 2 * noise + _CERTAIN * _divisor(sampling))
    return ids, sure


def _lead(logits: Tensor) -> Tensor:
    """(B,) by how much the largest is larger than the second."""
    first, second = logits.topk(2, dim=-1).values.unbind(-1)
    return first - second


def _open(probability: Tensor, kept: Tensor, sampling: Sampling, relative: Tensor) -> Tensor:
    """(B,) by how much tokens of which it is open whether they are kept can move a cumulative probability at most, each
    probability (B, V) being known but for a factor between ``exp(+-relative)`` and for one that all share."""
    least = probability.masked_fill(~kept, torch.inf).amin(-1)
    next_one = probability.masked_fill(kept, 0.0).amax(-1)
    total = (probability * kept).sum(-1)
    wide = 2 * relative  # as a logarithm
    less, more = (-wide).exp(), wide.exp()
    doubt = next_one >= least * less
    among = probability  # what top_p is a share of
    if sampling.top_k is not None:
        among = probability.topk(min(sampling.top_k, probability.shape[1]), dim=-1).values
        doubt |= kept.sum(-1) > sampling.top_k  # equal ones at the border
    if sampling.top_p < 1:
        share, last = total / among.sum(-1), least / among.sum(-1)
        doubt |= ((share - sampling.top_p).abs() <= wide) | ((share - last - sampling.top_p).abs() <= wide)
    if sampling.min_p > 0:
        limit = sampling.min_p * probability.amax(-1)
        doubt |= (least <= limit * more) | ((next_one >= limit * less) & (next_one <= limit * more))
    low, high = torch.minimum(least, next_one) * less**2, least * more**2
    near = (probability >= low.unsqueeze(1)) & (probability <= high.unsqueeze(1))
    share = (2 * wide + (probability * near).sum(-1) / total).clamp_max(1.0)
    return torch.where(doubt, share / (1 - share), 0.0)


def token_logprobs(logits: Tensor, ids: Tensor, top: int) -> list[TokenLogprob]:
    """Of each row's chosen id (B,) under the model's own logits (B, V), with the ``top`` most likely ids."""
    logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    own = logprobs.gather(1, ids.unsqueeze(1)).squeeze(1).tolist()
    likeliest = logprobs.topk(min(top, logprobs.shape[1]), dim=-1)
    pairs = [
        tuple(zip(*row, strict=True)) for row in zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    ]
    return [TokenLogprob(token, value, row) for token, value, row in zip(ids.tolist(), own, pairs, strict=True)]
