"""Losses of single tokens, and log-likelihoods of continuations in batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hybridlm.data.windows.order import IGNORE
from hybridlm.model.lm import HybridLM


@torch.no_grad()
def token_losses(model: HybridLM, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each target in nats, float64 and 0 where the target is ignored (-100), and whether the target is the most
    likely id, False where ignored; both (B, T) on the CPU.

    ids, targets: (B, T). The model is in evaluation mode.
    """
    device = model.embedding.weight.device
    output = model(ids.to(device), targets=targets.to(device), each=True)
    return output.losses.double().cpu(), output.likeliest.cpu() & (targets != IGNORE)


class Continuation(NamedTuple):
    """ids: context and continuation, at least one id; length: ids of the continuation, fewer than all."""

    ids: tuple[int, ...]
    length: int


def loglikelihoods(model: HybridLM, requests: Sequence[Continuation], batch: int) -> list[tuple[float, bool]]:
    """For each request the log-likelihood of its continuation in nats, and whether greedy decoding produces it. Equal
    requests are computed once, in batches of similar length."""
    unique = sorted(set(requests), key=lambda request: (-len(request.ids), request))
    scores: dict[Continuation, tuple[float, bool]] = {}
    for first in range(0, len(unique), batch):
        some = unique[first : first + batch]
        scores |= zip(some, _batched(model, some), strict=True)
    return [scores[request] for request in requests]


def _batched(model: HybridLM, requests: Sequence[Continuation]) -> list[tuple[float, bool]]:
    """One forward; shorter rows are padded on the right, which no token attends to."""
    longest = max(1, *(len(request.ids) - 1 for request in requests))
    ids = torch.zeros(len(requests), longest, dtype=torch.long)
    targets = torch.full_like(ids, IGNORE)
    for row, (tokens, length) in enumerate(requests):
        end = len(tokens) - 1
        ids[row, :end] = torch.tensor(tokens[:-1], dtype=torch.long)
        targets[row, end - length : end] = torch.tensor(tokens[len(tokens) - length :], dtype=torch.long)
    losses, likeliest = token_losses(model, ids, targets)
    greedy = (likeliest | (targets == IGNORE)).all(1)
    return list(zip((-losses.sum(1)).tolist(), greedy.tolist(), strict=True))
