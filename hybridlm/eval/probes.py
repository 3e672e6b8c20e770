"""Probes of what a text model does with its context, made of its own vocabulary so that nothing can be memorised.

``induction`` and ``copying`` (``data.synthetic.text_probes``) repeat random tokens, and compare the loss where a token
can be known with the loss where it cannot. ``passkey`` hides a number among lines of filler and asks for it at the end
(Mohtashami and Jaggi 2023, arXiv 2305.16300), here against nine other numbers.
"""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

from hybridlm.data.synthetic.text_probes import SHORTEST, TEXT_PROBES, ordinary_tokens
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import UserError
from hybridlm.eval.scoring import Continuation, loglikelihoods, token_losses
from hybridlm.model.lm import HybridLM

EXAMPLES = 32  # of each probe and length
_SEED = 0  # the same examples for every run
_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
_WRONG_KEYS = 9


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
    """By name of the probe, its metrics at lengths that double up to ``context`` tokens, the longest last; a probe that
    does not fit is left out. UserError: none fits."""
    lengths = [SHORTEST << power for power in range(24) if SHORTEST << power <= context]
    if not lengths:
        raise UserError(f"--probes: a context of {context} tokens is too short; use --context {SHORTEST} or more")
    curves: dict[str, list[dict[str, float]]] = defaultdict(list)
    for length in lengths:
        found = text_probe_metrics(model, tokenizer, examples=EXAMPLES, length=length, seed=_SEED, batch=batch)
        for name in TEXT_PROBES:
            metrics = {metric: found[f"{name}/{metric}"] for metric in ("loss", "baseline", "accuracy")}
            curves[name].append({"length": length, **metrics})
        if passkey := _passkey(model, tokenizer, length, batch):
            curves["passkey"].append({"length": length, **passkey})
    return curves


def _passkey(model: HybridLM, tokenizer: Tokenizer, length: int, batch: int) -> dict[str, float]:
    """chosen: how often the key is more likely than nine others (chance 0.1); written: how often greedy decoding
    produces it; empty where the text does not fit. The depth of the key varies evenly over the examples."""
    keys = np.random.default_rng(_SEED).integers(10_000, 100_000, (EXAMPLES, 1 + _WRONG_KEYS)).tolist()
    answers = [[tokenizer.encode(f" {key}") for key in row] for row in keys]
    prompts = [_passkey_prompt(tokenizer, row[0], 0, 0) for row in keys]
    longest = max(map(len, prompts)) + max(len(ids) for row in answers for ids in row)
    if longest > length:
        return {}
    lines = (length - longest) // len(tokenizer.encode(_FILLER))
    requests = []
    for example, (row, options) in enumerate(zip(keys, answers, strict=True)):
        prompt = _passkey_prompt(tokenizer, row[0], lines, round(lines * example / (EXAMPLES - 1)))
        requests += [Continuation((*prompt, *answer), len(answer)) for answer in options]
    found = loglikelihoods(model, requests, batch)
    scores = [found[first : first + 1 + _WRONG_KEYS] for first in range(0, len(found), 1 + _WRONG_KEYS)]
    return {
        "chosen": sum(right > max(nats for nats, _ in wrong) for (right, _), *wrong in scores) / EXAMPLES,
        "written": sum(greedy for (_, greedy), *_ in scores) / EXAMPLES,
        "loss": -math.fsum(nats for (nats, _), *_ in scores) / sum(len(options[0]) for options in answers),
    }


def _passkey_prompt(tokenizer: Tokenizer, key: int, lines: int, before: int) -> list[int]:
    """``lines`` of filler, ``before`` of them in front of the line with the key, and the question."""
    hidden = f"The pass key is {key}. Remember it.\n"
    text = _FILLER * before + hidden + _FILLER * (lines - before) + "What is the pass key? The pass key is"
    return [tokenizer.eos_id, *tokenizer.encode(text)]
