"""What a language model does with its context, asked in its own vocabulary and with nothing it could have learned by
heart.

``induction`` and ``copying`` are those of ``data.synthetic``: random tokens that come again, against random tokens that
nothing foretells. ``passkey`` is text: a number told among lines of filler and asked for at the end (Mohtashami and
Jaggi 2023, arXiv 2305.16300), here against nine other numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hybridlm.data.synthetic.text_probes import SHORTEST, TEXT_PROBES, TextProbe, ordinary_tokens
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.data.windows.order import IGNORE
from hybridlm.errors import UserError
from hybridlm.eval.scoring import Row, scored
from hybridlm.model.lm import HybridLM

_ROWS = 32  # examples of each length
_SEED = 0  # the same examples for every run
_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
_OTHERS = 9  # wrong keys


@dataclass(frozen=True)
class Probe:
    """metrics: at the longest length that fits; curve: a row of numbers for each length."""

    name: str
    settings: dict[str, Any]
    metrics: dict[str, float]
    curve: list[dict[str, float]]


def run_probes(model: HybridLM, tokenizer: Tokenizer, context: int, batch: int) -> list[Probe]:
    """All probes at lengths that double up to ``context`` tokens; one for which that is too short is left out.
    ConfigError: all are."""
    lengths = [SHORTEST << power for power in range(24) if SHORTEST << power <= context]
    if not lengths:
        raise UserError(
            f"--probes: a context of {context} tokens is too short; legal is {SHORTEST} or more (--context)"
        )
    tokens = ordinary_tokens(tokenizer.token_bytes())
    curves: dict[str, list[dict[str, float]]] = {}
    for name, make in TEXT_PROBES.items():
        curves[name] = [
            {"length": length, **_copied(model, make(tokens, _ROWS, length, _SEED), batch)} for length in lengths
        ]
    curves["passkey"] = [
        {"length": length, **found} for length in lengths if (found := _passkey(model, tokenizer, length, batch))
    ]
    return [
        Probe(name, {"context": context, "rows": _ROWS}, curve[-1], curve) for name, curve in curves.items() if curve
    ]


@torch.inference_mode()
def _copied(model: HybridLM, probe: TextProbe, batch: int) -> dict[str, float]:
    """Loss (nats a token) and accuracy where the token can be known, and the loss where it cannot."""
    device = model.embedding.weight.device
    nats, right = {"loss": 0.0, "baseline": 0.0}, 0
    for first in range(0, len(probe.ids), batch):
        rows = slice(first, first + batch)
        ids = torch.from_numpy(probe.ids[rows]).to(device)
        for name, wanted in (("loss", probe.targets), ("baseline", probe.baseline)):
            targets = torch.from_numpy(wanted[rows]).to(device)
            output = model(ids, targets=targets, each=True)
            nats[name] += float(output.losses.double().sum())
            right += int((output.likeliest & (targets != IGNORE)).sum()) if name == "loss" else 0
    known, unknown = (int((wanted != IGNORE).sum()) for wanted in (probe.targets, probe.baseline))
    return {"loss": nats["loss"] / known, "baseline": nats["baseline"] / unknown, "accuracy": right / known}


def _passkey(model: HybridLM, tokenizer: Tokenizer, length: int, batch: int) -> dict[str, float]:
    """How often the key that was told is likelier than nine others (chance 0.1), and how often greedy decoding writes
    it; empty where the text does not fit. The key stands at depths that spread over the text."""
    keys = np.random.default_rng(_SEED).integers(10_000, 100_000, (_ROWS, 1 + _OTHERS)).tolist()
    answers = [[tokenizer.encode(f" {key}") for key in row] for row in keys]
    longest = max(len(_asked(tokenizer, row[0], 0, 0)) for row in keys) + max(
        len(ids) for row in answers for ids in row
    )
    if longest > length:
        return {}
    lines = (length - longest) // len(tokenizer.encode(_FILLER))
    rows: list[Row] = []
    for place, row in enumerate(keys):
        context = _asked(tokenizer, row[0], lines, round(lines * place / (_ROWS - 1)))
        rows += [Row((*context, *answer), len(answer)) for answer in answers[place]]
    found = scored(model, rows, batch)
    choices = [found[first : first + 1 + _OTHERS] for first in range(0, len(found), 1 + _OTHERS)]
    return {
        "chosen": sum(options[0][0] > max(nats for nats, _ in options[1:]) for options in choices) / _ROWS,
        "written": sum(options[0][1] for options in choices) / _ROWS,
        "loss": -math.fsum(options[0][0] for options in choices) / sum(len(row[0]) for row in answers),
    }


def _asked(tokenizer: Tokenizer, key: int, lines: int, before: int) -> list[int]:
    """The text up to the answer: ``lines`` of filler, ``before`` of them in front of the line that tells the key."""
    told = f"The pass key is {key}. Remember it.\n"
    text = _FILLER * before + told + _FILLER * (lines - before) + "What is the pass key? The pass key is"
    return [tokenizer.eos_id, *tokenizer.encode(text)]
