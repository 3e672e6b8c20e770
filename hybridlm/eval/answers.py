"""How many answers of a synthetic task a model has right, as the validation of training counts them."""

from __future__ import annotations

import numpy as np
import torch

from hybridlm.data.synthetic.source import GeneratedWindows
from hybridlm.data.windows.order import IGNORE
from hybridlm.model.lm import HybridLM


@torch.inference_mode()
def answered(model: HybridLM, windows: GeneratedWindows, batch: int, limit: int | None) -> dict[str, float]:
    """loss: nats an answer; accuracy: share of answers that are right; exact: share of examples all of whose answers
    are. limit: examples at most."""
    device, examples = model.embedding.weight.device, min(windows.numbers, limit or windows.numbers)
    nats, right, answers, whole = 0.0, 0, 0, 0
    for chosen in np.split(np.arange(examples), range(batch, examples, batch)):
        rows = windows.rows(chosen)
        targets = torch.from_numpy(rows.targets)
        output = model(torch.from_numpy(rows.ids).to(device), targets=targets.to(device), each=True)
        asked, likeliest = targets != IGNORE, output.likeliest.cpu()
        nats += float(output.losses.double().sum())
        right, answers = right + int((likeliest & asked).sum()), answers + int(asked.sum())
        whole += int((likeliest | ~asked).all(1).sum())
    return {
        "loss": nats / answers,
        "accuracy": right / answers,
        "exact": whole / examples,
        "answers": answers,
        "examples": examples,
    }
