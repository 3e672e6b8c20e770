"""Log-likelihoods of the ends of token rows, many rows at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from hybridlm.data.windows.order import IGNORE
from hybridlm.model.lm import HybridLM


class Row(NamedTuple):
    """At least one id, of which the last ``scored`` are to be predicted; fewer than there are."""

    ids: tuple[int, ...]
    scored: int


def scored(model: HybridLM, rows: Sequence[Row], batch: int) -> list[tuple[float, bool]]:
    """For each row the summed log-likelihood (nats) of its scored ids, and whether each of them is the likeliest. Equal
    rows are computed once, ``batch`` rows of like length at a time."""
    unique = sorted(set(rows), key=lambda row: (-len(row.ids), row))
    answers: dict[Row, tuple[float, bool]] = {}
    for first in range(0, len(unique), batch):
        some = unique[first : first + batch]
        answers |= zip(some, _together(model, some), strict=True)
    return [answers[row] for row in rows]


@torch.inference_mode()
def _together(model: HybridLM, rows: Sequence[Row]) -> list[tuple[float, bool]]:
    """Of rows filled up at the right, which no token looks at."""
    longest = max(1, *(len(row.ids) - 1 for row in rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    targets = torch.full_like(ids, IGNORE)
    for place, (tokens, count) in enumerate(rows):
        end = len(tokens) - 1
        ids[place, :end] = torch.tensor(tokens[:-1], dtype=torch.long)
        if count:
            targets[place, end - count : end] = torch.tensor(tokens[-count:])
    device = model.embedding.weight.device
    output = model(ids.to(device), targets=targets.to(device), each=True)
    likely = (output.likeliest.cpu() | (targets == IGNORE)).all(1)
    return list(zip((-output.losses.double().sum(1)).tolist(), likely.tolist(), strict=True))
