"""What a language model does with its context, asked in its own vocabulary and with nothing it could have learned by heart.

``induction``: random tokens, then the same again (Olsson et al. 2022, "In-context Learning and Induction Heads"): the loss of the second
copy against the first. ``recall``: random pairs of tokens, then their first halves in another order (associative recall, Arora et al.
2023, "Zoology"). ``passkey``: a number told in a text of filler and asked for at its end (Mohtashami and Jaggi 2023), against nine others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hybridlm.config.section import ConfigError
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.data.windows.order import IGNORE
from hybridlm.eval.scoring import Row, scored
from hybridlm.model.lm import HybridLM

_ROWS = 32  # examples of each length
_SHORTEST = 16  # tokens
_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
_OTHERS = 9  # wrong keys


@dataclass(frozen=True)
class Probe:
    """metrics: at the longest length; curve: a row of numbers for each length."""

    name: str
    settings: dict[str, Any]
    metrics: dict[str, float]
    curve: list[dict[str, float]] = field(default_factory=list)


def run_probes(model: HybridLM, tokenizer: Tokenizer, context: int, batch: int, seed: int = 0) -> list[Probe]:
    """All probes at lengths that double up to ``context`` tokens. ConfigError: the context is too short for any."""
    lengths = [length for length in (_SHORTEST << power for power in range(24)) if length <= context]
    if not lengths:
        raise ConfigError(f"--probes: a context of {context} tokens is too short; from {_SHORTEST} on (--context)")
    words = torch.tensor([token for token, size in enumerate(tokenizer.token_bytes().tolist()) if size])
    asked: dict[str, Callable[[int, torch.Generator], dict[str, float]]] = {
        "induction": lambda length, generator: _induction(model, tokenizer.eos_id, words, length, batch, generator),
        "recall": lambda length, generator: _recall(model, tokenizer.eos_id, words, length, batch, generator),
        "passkey": lambda length, generator: _passkey(model, tokenizer, length, batch, generator),
    }
    probes = []
    for name, measure in asked.items():
        curve = []
        for length in lengths:
            if found := measure(length, torch.Generator().manual_seed(seed)):
                curve.append({"length": length, **found})
        if curve:
            metrics = {key: value for key, value in curve[-1].items() if key != "length"}
            probes.append(Probe(name, {"context": context, "rows": _ROWS, "seed": seed}, metrics, curve))
    return probes


def _induction(model: HybridLM, eos_id: int, words: torch.Tensor, length: int, batch: int, generator: torch.Generator) -> dict[str, float]:
    """Loss (nats a token) of both copies, and how often the second is right; its first token, which nothing tells, is left out."""
    half = (length - 1) // 2
    block = words[torch.randint(len(words), (_ROWS, half), generator=generator)]
    ids = torch.cat([torch.full((_ROWS, 1), eos_id), block, block], 1)
    targets = ids[:, 1:].clone()
    losses, right = _each(model, ids[:, :-1], targets, batch)
    second = slice(half + 1, None)
    return {
        "loss_first": float(losses[:, 1:half].mean()),
        "loss_second": float(losses[:, second].mean()),
        "accuracy": float(right[:, second].double().mean()),
    }


def _recall(model: HybridLM, eos_id: int, words: torch.Tensor, length: int, batch: int, generator: torch.Generator) -> dict[str, float]:
    """Loss and accuracy of the second halves behind the first halves that are asked for; keys of a row differ."""
    pairs = min((length - 1) // 4, len(words) // 2)
    shuffled = torch.stack([words[torch.randperm(len(words), generator=generator)[: 2 * pairs]] for _ in range(_ROWS)])
    told = shuffled.view(_ROWS, pairs, 2)
    again = torch.stack([row[torch.randperm(pairs, generator=generator)] for row in told])
    ids = torch.cat([torch.full((_ROWS, 1), eos_id), told.flatten(1), again.flatten(1)], 1)
    targets = torch.full_like(ids[:, 1:], IGNORE)
    targets[:, 2 * pairs + 1 :: 2] = ids[:, 2 * pairs + 2 :: 2]
    losses, right = _each(model, ids[:, :-1], targets, batch)
    return {"loss": float(losses.sum()) / (_ROWS * pairs), "accuracy": float(right.sum()) / (_ROWS * pairs), "chance": 1 / len(words)}


@torch.inference_mode()
def _each(model: HybridLM, ids: torch.Tensor, targets: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, T) losses in float64, and which targets that count are the likeliest."""
    device = model.embedding.weight.device
    parts = [
        model(some.to(device), targets=wanted.to(device), each=True)
        for some, wanted in zip(ids.split(batch), targets.split(batch), strict=True)
    ]
    losses = torch.cat([part.losses.double().cpu() for part in parts])
    return losses, torch.cat([part.likeliest.cpu() for part in parts]) & (targets != IGNORE)


def _passkey(model: HybridLM, tokenizer: Tokenizer, length: int, batch: int, generator: torch.Generator) -> dict[str, float]:
    """How often the key that was told is likelier than nine others (chance 0.1), and how often greedy decoding writes it; nothing where
    the text does not fit. The key stands at depths that spread over the text."""
    filler = len(tokenizer.encode(_FILLER))
    numbers = torch.randint(10_000, 100_000, (_ROWS, 1 + _OTHERS), generator=generator).tolist()
    room = length - len(_passkey_ids(tokenizer, 10_000, 0, 0)) - len(tokenizer.encode(" 10000"))
    if room < 0:
        return {}
    lines = room // filler
    rows: list[Row] = []
    for place, keys in enumerate(numbers):
        context = _passkey_ids(tokenizer, keys[0], lines, round(lines * place / (_ROWS - 1)))
        answers = [tokenizer.encode(f" {key}") for key in keys]
        rows += [Row((*context, *answer), len(answer)) for answer in answers]
    found = scored(model, rows, batch)
    choices = [found[first : first + 1 + _OTHERS] for first in range(0, len(found), 1 + _OTHERS)]
    best = [max(range(1 + _OTHERS), key=lambda i, options=options: options[i][0]) for options in choices]  # type: ignore[misc]
    tokens = [row.scored for row in rows[:: 1 + _OTHERS]]
    return {
        "chosen": sum(choice == 0 for choice in best) / _ROWS,
        "written": sum(options[0][1] for options in choices) / _ROWS,
        "loss": -math.fsum(options[0][0] for options in choices) / sum(tokens),
    }


def _passkey_ids(tokenizer: Tokenizer, key: int, lines: int, before: int) -> Sequence[int]:
    """The text up to the answer: ``lines`` of filler, ``before`` of them in front of the line that tells the key."""
    told = f"The pass key is {key}. Remember it.\n"
    text = _FILLER * before + told + _FILLER * (lines - before) + "What is the pass key? The pass key is"
    return [tokenizer.eos_id, *tokenizer.encode(text)]
