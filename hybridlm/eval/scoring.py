"""Losses of single tokens, log-likelihoods of continuations in batches, and accuracy on a synthetic task, counted as
the validation during training counts it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hybridlm.data.synthetic.source import GeneratedWindows
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


def synthetic_metrics(model: HybridLM, windows: GeneratedWindows, batch: int, limit: int | None) -> dict[str, float]:
    """loss: nats per answer; accuracy: share of correct answers; exact: share of examples with all answers correct.
    limit: examples at most."""
    examples = min(windows.numbers, limit or windows.numbers)
    sums = np.zeros(4)  # nats, correct answers, answers, examples with all answers correct
    for chosen in np.split(np.arange(examples), range(batch, examples, batch)):
        rows = windows.rows(chosen)
        targets = torch.from_numpy(rows.targets)
        losses, likeliest = token_losses(model, torch.from_numpy(rows.ids), targets)
        ignored = targets == IGNORE
        exact = (likeliest | ignored).all(1)
        sums += [float(part.sum()) for part in (losses, likeliest, ~ignored, exact)]
    nats, correct, answers, right = sums.tolist()
    metrics = {"loss": nats / answers, "accuracy": correct / answers, "exact": right / examples}
    return metrics | {"answers": int(answers), "examples": examples}
