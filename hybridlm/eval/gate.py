"""The gate, `hybridlm check`: proof, for one configuration, that its layers do what they claim.

Its checks are of two kinds. The numeric ones run each distinct layer once, in float64 on the CPU; the others examine
the model as it is, on the meta device. A check fails where its error is above the limit or not a number, and where it
raises.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal, NamedTuple

from hybridlm.config.layers import LayerSpec
from hybridlm.config.run import RunConfig
from hybridlm.eval.gate_costs import flops, initial_weights, parameters, state_bytes
from hybridlm.eval.gate_numeric import (
    causality,
    checkpointing,
    chunked_prefill,
    decode,
    derivative,
    documents,
    experts,
    gradients,
    left_padding,
)
from hybridlm.eval.gate_subject import VOCAB, Findings, Subject

_EXACT = 1e-8  # of float64 results, as a share of the largest number
_QUOTIENT = 1e-6  # of a central difference
_ZERO = 1e-12  # of a loss that does not change
_LINE = "{:15}  {:70}  {:>11}  {:>7}  {:6}  {:>7}"


class Check(NamedTuple):
    name: str
    compared: str
    limit: float
    find: Callable[[Subject], Findings]


_CHECKS = (
    Check("causality", "logits before a changed token", _EXACT, causality),
    Check("decode", "one token at a time after a prefill, with the full forward", _EXACT, decode),
    Check("chunked prefill", "a text in random pieces, with the full forward", _EXACT, chunked_prefill),
    Check("left padding", "a padded batch with each row alone, prefill and decode", _EXACT, left_padding),
    Check("documents", "a packed text with each document alone: logits, loss, gradients", _EXACT, documents),
    Check("checkpointing", "loss and gradients with and without recomputation", _EXACT, checkpointing),
    Check("gradients", "every parameter has one, and it is finite", _ZERO, gradients),
    Check("derivative", "autograd with a difference quotient along a random direction", _QUOTIENT, derivative),
    Check("initial weights", "every parameter is drawn, and finite", 0.0, initial_weights),
    Check("parameters", "whole model: declared, and built", 0.0, parameters),
    Check("state bytes", "announced, with a cache that was used", 0.0, state_bytes),
    Check("FLOPs", "announced, with the products that torch sees", 1e-9, flops),
    Check("experts", "counts and balance loss: padding left out, uniform routing", _EXACT, experts),
)


@dataclass(frozen=True)
class Row:
    """One result. error: the worst found, or not a number; status: n/a where the model has nothing to compare; note:
    what failed, and which layer is to blame."""

    name: str
    compared: str
    error: float
    limit: float
    status: Literal["pass", "fail", "n/a"]
    seconds: float
    note: str = ""


def run_check(config: RunConfig, *, as_json: bool) -> bool:
    """Runs the gate and prints its rows as they come: aligned lines for people, or a line of JSON for each. False where
    a row fails."""
    began, subject, rows = time.perf_counter(), Subject.of(config), list[Row]()
    title = f"{config.model.name}: {head_line(config, subject)}"
    columns = _LINE.format("check", "compared", "worst error", "limit", "", "seconds")
    print(json.dumps({"checked": title}) if as_json else f"{title}\n{columns}", flush=True)
    for row in gate(subject):
        print(_json(row) if as_json else line(row), flush=True)
        rows.append(row)
    failed = [row for row in rows if row.status == "fail"]
    if not as_json:
        print("".join(f"{row.name}: {row.note}\n" for row in failed), end="")
        ran = sum(row.status != "n/a" for row in rows)
        verdict = f"{len(failed)} of {ran} checks failed" if failed else f"{ran} checks passed"
        print(f"{verdict} in {time.perf_counter() - began:.1f} s")
    return not failed


def head_line(config: RunConfig, subject: Subject) -> str:
    """What the numeric checks run on."""
    plan, places = subject.plan, subject.places
    narrowed = f" instead of {config.model.d_model}" if plan.width < config.model.d_model else ""
    return (
        f"{len(places)} distinct of {sum(map(len, places.values()))} layers, {plan.width} wide{narrowed}, float64,"
        f" {VOCAB} ids, texts of {plan.tokens} tokens, chunks of at most {plan.chunk}, seed {subject.seed}"
    )


def line(row: Row) -> str:
    if row.status == "n/a":
        return _LINE.format(row.name, row.note, "", "", row.status, "").rstrip()
    error, limit, seconds = f"{row.error:.1e}", f"{row.limit:.0e}", f"{row.seconds:.1f}"
    return _LINE.format(row.name, row.compared, error, limit, row.status.upper(), seconds)


def _json(row: Row) -> str:
    """JSON knows no infinity: ``error`` is null where it is not finite."""
    return json.dumps(asdict(row) | {"error": row.error if math.isfinite(row.error) else None})


def gate(subject: Subject) -> Iterator[Row]:
    """Runs the checks in their order. What a check raises is a failed row."""
    for check in _CHECKS:
        began = time.perf_counter()
        worst = _worst(check, subject)
        if worst is None:
            yield Row(check.name, check.compared, 0.0, check.limit, "n/a", 0.0, f"no layer has {check.name}")
        elif worst[0] <= check.limit:
            yield Row(check.name, check.compared, worst[0], check.limit, "pass", time.perf_counter() - began)
        else:
            note, seconds = f"{worst[1]}; {_blame(check, subject)}", time.perf_counter() - began
            yield Row(check.name, check.compared, worst[0], check.limit, "fail", seconds, note)


def _worst(check: Check, subject: Subject) -> tuple[float, str] | None:
    """The largest error and what it is one of, NaN before any number; None if there was nothing to compare."""
    try:
        return max(check.find(subject), key=lambda found: (math.isnan(found[0]), found[0]), default=None)
    except Exception as error:  # whatever a broken layer raises
        return math.inf, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _blame(check: Check, subject: Subject) -> str:
    """Which layers fail by themselves, and whether it is their mixer or their FFN."""

    def fails(layer: LayerSpec) -> bool:
        worst = _worst(check, subject.alone(layer))
        return worst is not None and not worst[0] <= check.limit

    guilty = []
    for spec, places in subject.places.items():
        if fails(spec):
            by_mixer = spec.ffn is None or fails(replace(spec, ffn_kind="none", ffn=None))
            guilty.append(f"{spec.kind if by_mixer else spec.ffn_kind} ({_places(places)})")
    if not guilty:
        return "no layer fails by itself" if len(subject.places) > 1 else "the model around the layers"
    return f"to blame: {', '.join(guilty)}"


def _places(places: Sequence[int]) -> str:
    shown = ", ".join(map(str, places[:4]))
    return f"layer{'s' if len(places) > 1 else ''} {shown}{', ...' if len(places) > 4 else ''}"
