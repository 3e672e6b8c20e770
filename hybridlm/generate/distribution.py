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
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # The largest becomes 0, so that none overflows.
    logits = (logits - logits.amax(-1, keepdim=True)) / min(max(sampling.temperature, _COLDEST), _HOTTEST)
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


def chosen(logits: Tensor, sampling: Sampling, draws: Sequence[float]) -> Tensor:
    """The next id of each row, (B,): the most likely if temperature is 0, else the first id at which the cumulative
    probability, in order of the ids, exceeds the row's draw.

    logits: (B, V), adjusted. draws: one number in [0, 1) per row. Rounding of the logits changes the token only if a
    draw falls within that rounding of a border.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    running = probabilities(logits, sampling).double().cumsum(-1)
    target = torch.tensor(draws, dtype=torch.float64, device=logits.device).unsqueeze(1) * running[:, -1:]
    return torch.searchsorted(running, target, right=True).squeeze(1)


def token_logprobs(logits: Tensor, ids: Tensor, top: int) -> list[TokenLogprob]:
    """Of each row's chosen id (B,) under the model's own logits (B, V), with the ``top`` most likely ids."""
    logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    own = logprobs.gather(1, ids.unsqueeze(1)).squeeze(1).tolist()
    likeliest = logprobs.topk(min(top, logprobs.shape[1]), dim=-1)
    pairs = [
        tuple(zip(*row, strict=True)) for row in zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    ]
    return [TokenLogprob(token, value, row) for token, value, row in zip(ids.tolist(), own, pairs, strict=True)]
