"""The probes of a text model, measured: how much better it foretells what it has just read than what nothing
foretells."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm.data.synthetic.text_probes import TEXT_PROBES, ordinary_tokens
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.model.lm import HybridLM

_LOGITS = 1 << 25  # numbers at a time


@torch.no_grad()
def text_probe_metrics(
    model: HybridLM, tokenizer: Tokenizer, *, examples: int, length: int, seed: int = 0
) -> dict[str, float]:
    """For each probe NAME: ``NAME/loss`` (nats a token, of what can be known), ``NAME/baseline`` (of the tokens that
    cannot) and ``NAME/accuracy`` (share of the former that are the model's first choice). The model is in evaluation
    mode.

    length: tokens of an example, at least ``SHORTEST``. The same seed gives the same examples.
    """
    tokens = ordinary_tokens(tokenizer.token_bytes())
    found: dict[str, float] = {}
    device = model.embedding.weight.device
    for name, make in TEXT_PROBES.items():
        probe = make(tokens, examples, length, seed)
        rows = max(1, _LOGITS // (length * model.vocab_size))
        sums = torch.zeros(
            5, dtype=torch.float64
        )  # nats and count of the targets, those right; nats and count of the baseline
        for parts in zip(*(torch.from_numpy(part).split(rows) for part in probe), strict=True):
            ids, targets, baseline = (part.to(device) for part in parts)
            logits = model(ids).logits
            right = ((logits.argmax(-1) == targets) & (targets >= 0)).sum()
            sums += torch.stack([*_nats(logits, targets), right.double(), *_nats(logits, baseline)]).cpu()
        nats, count, right, other, others = sums.tolist()
        found |= {f"{name}/loss": nats / count, f"{name}/baseline": other / others, f"{name}/accuracy": right / count}
    return found


def _nats(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the losses at the targets that count, and their number."""
    asked = targets >= 0
    losses = torch.nn.functional.cross_entropy(logits[asked].double(), targets[asked], reduction="sum")
    return losses, asked.sum().double()
