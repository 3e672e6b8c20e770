"""The gate: proof, for one configuration, that its layers do what they claim.

Its rows are of two kinds. The numeric ones run a model of each distinct layer, once, in float64 on the CPU; the others
examine the model as it is, on the meta device. A row fails where its error is above the limit or not a
number, and where it raises.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, cast

from hybridlm.config.layers import LayerSpec
from hybridlm.config.resolve import resolve_layers
from hybridlm.config.run import RunConfig
from hybridlm.eval.gate_costs import flops, initial_weights, parameters, state_bytes
from hybridlm.eval.gate_sequences import causality, chunked_prefill, decode, documents, left_padding
from hybridlm.eval.gate_subject import VOCAB, Plan, Subject, Worst, build_layers, distinct_layers, make_plan
from hybridlm.eval.gate_training import checkpointing, derivative, experts, gradients
from hybridlm.model.block import Block
from hybridlm.model.build import build_model
from hybridlm.model.lm import HybridLM

Status = Literal["pass", "fail", "n/a"]
_EXACT = 1e-8  # of float64 results, as a share of the largest number
_QUOTIENT = 1e-6  # of a central difference
_ZERO = 1e-12  # of a loss that does not change


@dataclass(frozen=True)
class Row:
    """One result. error: the worst found, infinite where something is not a number. note: what failed, and which
    layer is to blame."""

    name: str
    compared: str
    error: float
    limit: float
    status: Status
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class _Check:
    name: str
    compared: str
    limit: float
    run: Callable[[_Run], Worst]
    experts_only: bool = False


class _Run:
    """What the checks of one run share: the model as it is (on the meta device), and the subject that the numeric rows
    run on."""

    def __init__(
        self, config: RunConfig, places: Mapping[LayerSpec, Sequence[int]], plan: Plan, full: HybridLM
    ) -> None:
        """places: each distinct layer of ``full`` with its places."""
        self.config, self.places, self.plan, self.full = config, places, plan, full
        self.layers = list(places)

    @cached_property
    def subject(self) -> Subject:
        return Subject(self.layers, self.config.model, self.plan, self.config.seed)

    def alone(self, layer: LayerSpec) -> _Run:
        """The same run with one layer only."""
        return _Run(self.config, {layer: [0]}, self.plan, build_layers([layer], self.full.config, self.full))


def _on(check: Callable[[Subject], Worst]) -> Callable[[_Run], Worst]:
    return lambda run: check(run.subject)


_CHECKS = (
    _Check("causality", "logits before a changed token", _EXACT, _on(causality)),
    _Check("decode", "one token at a time after a prefill, with the full forward", _EXACT, _on(decode)),
    _Check("chunked prefill", "a text in random pieces, with the full forward", _EXACT, _on(chunked_prefill)),
    _Check("left padding", "a padded batch with each row alone, prefill and decode", _EXACT, _on(left_padding)),
    _Check("documents", "a packed text with each document alone: logits, loss, gradients", _EXACT, _on(documents)),
    _Check("checkpointing", "loss and gradients with and without recomputation", _EXACT, _on(checkpointing)),
    _Check("gradients", "every parameter has one, and it is finite", _ZERO, _on(gradients)),
    _Check("derivative", "autograd with a difference quotient along a random direction", _QUOTIENT, _on(derivative)),
    _Check(
        "initial weights",
        "every parameter is drawn, and finite",
        0.0,
        lambda run: initial_weights(run.full, run.subject),
    ),
    _Check("parameters", "whole model: declared, and built", 0.0, lambda run: parameters(run.full, run.places)),
    _Check("state bytes", "announced, with a cache that was used", 0.0, _on(state_bytes)),
    _Check("FLOPs", "announced, with the products that torch sees", 1e-9, lambda run: flops(run.full, run.layers)),
    _Check(
        "experts", "counts and balance loss: padding left out, uniform routing", _EXACT, _on(experts), experts_only=True
    ),
)


class Gate:
    """The rows of one configuration, made one by one as ``rows`` is iterated."""

    def __init__(self, config: RunConfig) -> None:
        """``config``: as for training; only model, seed and data.seq_len are read."""
        self._specs = resolve_layers(config.model)
        self._distinct = distinct_layers(self._specs)
        full = build_model(config.model, config.model.vocab_size or config.data.tokenizer.vocab_size)
        self._run = _Run(config, self._distinct, make_plan(list(self._distinct), config.model.d_model), full)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(check.name for check in _CHECKS)

    @property
    def head_line(self) -> str:
        """What the numeric rows run on."""
        plan, config = self._run.plan, self._run.config
        wide = f"{plan.width} wide" + (
            f" instead of {config.model.d_model}" if plan.width < config.model.d_model else ""
        )
        return (
            f"{len(self._distinct)} distinct of {len(self._specs)} layers, {wide}, float64, {VOCAB} ids, texts of"
            f" {plan.tokens} tokens, chunks of at most {plan.chunk}, seed {config.seed}"
        )

    def rows(self) -> Iterator[Row]:
        """Runs the checks in their order. What a check raises is a failed row."""
        for check in _CHECKS:
            began = time.perf_counter()
            if check.experts_only and not any(map(self._has_experts, self._distinct)):
                yield Row(check.name, check.compared, 0.0, check.limit, "n/a", 0.0, "no layer has experts")
                continue
            worst = _attempt(check, self._run)
            passed = _passed(worst, check)
            note = "" if passed else f"{worst.where}; {self._blame(check)}"
            status: Status = "pass" if passed else "fail"
            yield Row(check.name, check.compared, worst.error, check.limit, status, time.perf_counter() - began, note)

    def _blame(self, check: _Check) -> str:
        """Which layers fail by themselves, and whether it is their mixer or their FFN."""
        guilty = []
        for spec, places in self._distinct.items():
            if (check.experts_only and not self._has_experts(spec)) or self._passes(check, spec):
                continue
            part = spec.kind
            if check.experts_only or (
                spec.ffn is not None and self._passes(check, replace(spec, ffn_kind="none", ffn=None))
            ):
                part = spec.ffn_kind
            guilty.append(f"{part} ({_places(places)})")
        if not guilty:
            return "no layer fails by itself" if len(self._distinct) > 1 else "the model around the layers"
        return f"to blame: {', '.join(guilty)}"

    def _has_experts(self, layer: LayerSpec) -> bool:
        ffn = cast(Block, self._run.full.blocks[self._distinct[layer][0]]).ffn
        return ffn is not None and ffn.n_experts > 0

    def _passes(self, check: _Check, layer: LayerSpec) -> bool:
        """Whether a model of this layer alone passes."""
        return _passed(_attempt(check, self._run.alone(layer)), check)


def _places(places: Sequence[int]) -> str:
    shown = ", ".join(str(place) for place in places[:4])
    return f"layer{'s' if len(places) > 1 else ''} {shown}{', ...' if len(places) > 4 else ''}"


def _attempt(check: _Check, run: _Run) -> Worst:
    try:
        return check.run(run)
    except Exception as error:  # whatever a broken layer raises
        worst = Worst()
        worst.see(math.inf, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return worst


def _passed(worst: Worst, check: _Check) -> bool:
    return worst.error <= check.limit
