"""Probes of what a text model does with its context, made of its own vocabulary so that nothing can be memorised:
``induction`` and ``copying`` (``data.synthetic.text_probes``) repeat random tokens, and compare the loss where a token
can be known with the loss where it cannot."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm.data.synthetic.text_probes import SHORTEST, TEXT_PROBES, ordinary_tokens
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import UserError
from hybridlm.eval.losses import token_losses
from hybridlm.model.lm import HybridLM

EXAMPLES = 32  # of each probe and length
_METRICS = ("loss", "baseline", "accuracy")


def text_probe_metrics(
    model: HybridLM, tokenizer: Tokenizer, *, examples: int, length: int, seed: int = 0, batch: int = 8
) -> dict[str, float]:
    """For each probe NAME: ``NAME/loss`` (nats per token that can be known), ``NAME/baseline`` (nats per token that
    cannot), ``NAME/accuracy`` (share of the former that are the most likely id). The model is in evaluation mode.

    length: tokens of an example, at least ``SHORTEST``. The same seed gives the same examples.
    """
    found, tokens = dict[str, float](), ordinary_tokens(tokenizer.token_bytes())
    for name, make in TEXT_PROBES.items():
        ids, *wanted = (torch.from_numpy(part) for part in make(tokens, examples, length, seed))
        (loss, accuracy), (baseline, _) = (_means(model, ids, targets, batch) for targets in wanted)
        found |= {f"{name}/loss": loss, f"{name}/baseline": baseline, f"{name}/accuracy": accuracy}
    return found


def _means(model: HybridLM, ids: Tensor, targets: Tensor, batch: int) -> tuple[float, float]:
    """Nats per target, and the share of targets that are the most likely id."""
    parts = [token_losses(model, *part) for part in zip(ids.split(batch), targets.split(batch), strict=True)]
    count = int((targets >= 0).sum())
    return sum(float(losses.sum()) for losses, _ in parts) / count, sum(int(hits.sum()) for _, hits in parts) / count


def run_probes(model: HybridLM, tokenizer: Tokenizer, context: int, batch: int) -> dict[str, list[dict[str, float]]]:
    """By name of the probe, its metrics at lengths that double up to ``context`` tokens, the longest last. UserError:
    none fits."""
    lengths = [SHORTEST << power for power in range(24) if SHORTEST << power <= context]
    if not lengths:
        raise UserError(f"--probes: a context of {context} tokens is too short; use --context {SHORTEST} or more")
    curves: dict[str, list[dict[str, float]]] = {name: [] for name in TEXT_PROBES}
    for length in lengths:
        found = text_probe_metrics(model, tokenizer, examples=EXAMPLES, length=length, batch=batch)
        for name, rows in curves.items():
            rows.append({"length": length, **{metric: found[f"{name}/{metric}"] for metric in _METRICS}})
    return curves
