"""Accuracy on a synthetic task, counted as the validation during training counts it."""

from __future__ import annotations

import numpy as np
import torch

from hybridlm.data.synthetic.source import GeneratedWindows
from hybridlm.data.windows.order import IGNORE
from hybridlm.eval.scoring import token_losses
from hybridlm.model.lm import HybridLM


def synthetic_metrics(model: HybridLM, windows: GeneratedWindows, batch: int, limit: int | None) -> dict[str, float]:
    """loss: nats per answer; accuracy: share of correct answers; exact: share of examples with all answers correct.
    limit: examples at most."""
    examples = min(windows.numbers, limit or windows.numbers)
    nats, right, answers, exact = 0.0, 0, 0, 0
    for chosen in np.split(np.arange(examples), range(batch, examples, batch)):
        rows = windows.rows(chosen)
        targets = torch.from_numpy(rows.targets)
        losses, likeliest = token_losses(model, torch.from_numpy(rows.ids), targets)
        ignored = targets == IGNORE
        nats, right = nats + float(losses.sum()), right + int(likeliest.sum())
        answers, exact = answers + int((~ignored).sum()), exact + int((likeliest | ignored).all(1).sum())
    metrics = {"loss": nats / answers, "accuracy": right / answers, "exact": exact / examples}
    return metrics | {"answers": answers, "examples": examples}
