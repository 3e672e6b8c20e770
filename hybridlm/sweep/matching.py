"""Matches models in cost: widths change until a pattern has the parameters, or the FLOPs per token, of a reference
pattern.

The hidden width of the FFNs is tried first, then the width of the mixers that can be widened (each kind's section says
how: ``widened``), then d_model, alone before combined; the first that comes within the tolerance is taken or, if none
does, the nearest. Hidden widths and inner channels become multiples of 64, 32, 16 or 8 (the first that suffices),
d_model of 32, 16 or 8, and heads whose width follows d_model keep a multiple of 8 channels: Tensor Cores need rows of a
multiple of 16 bytes, 8 numbers of 16 bits, and are fastest with 128 bytes (NVIDIA, Matrix Multiplication Background
User's Guide).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from hybridlm.config.ffns import FFNS
from hybridlm.config.layers import LayerSection, Spec
from hybridlm.config.mixers import MIXERS
from hybridlm.config.model import ModelConfig
from hybridlm.config.overrides import quoted
from hybridlm.config.run import RunConfig
from hybridlm.errors import UserError

TOLERANCE = {"params": 0.01, "flops": 0.02}
_MULTIPLES = (64, 32, 16, 8)
# How many times smaller or larger; d_model is kept near first.
_FFN_RANGE, _MIXER_RANGE, _WIDTH_RANGES = 16.0, 4.0, (1.25, 4.0)
_HALVINGS = 24


@dataclass(frozen=True)
class Matched:
    """A configuration after matching, and the overrides that turn the original into it; none if no match was requested,
    or the configuration is already matched."""

    config: RunConfig
    overrides: tuple[str, ...]


def matched(config: RunConfig) -> Matched:
    """``config`` at the cost that ``sweep`` requests. ConfigError: the tokenizer that defines the vocabulary cannot be
    read."""
    by = config.sweep.match
    if by is None or config.sweep.matched is not None:
        return Matched(config, ())
    from hybridlm.sweep.costs import cost_function  # counts on a built model, which imports torch

    cost = cost_function(config)
    depth = {"pattern": config.sweep.reference, "n_layers": len(config.model.layers)}
    target = config.sweep.target or cost(config.model.model_copy(update=depth))
    model = _Search(config.model, cost, target, TOLERANCE[by]).best()
    note = _note(config, model, cost(model), target)
    found = config.model_copy(update={"model": model, "sweep": config.sweep.model_copy(update={"matched": note})})
    settings = [f"++{field}={value}" for field, value in _settings(config.model, model)]
    return Matched(found, (*settings, f"++sweep.matched={quoted(note)}"))


class _Search:
    """Searches for the model that costs ``target``."""

    def __init__(self, model: ModelConfig, cost: Callable[[ModelConfig], int], target: int, tolerance: float) -> None:
        self._model, self._cost, self._target, self._tolerance = model, cost, target, tolerance
        self._head_dims = _head_dims(model)

    def best(self) -> ModelConfig:
        """The first within the tolerance, else the nearest."""
        best, distance = self._model, self._distance(self._model)
        for candidate in self._candidates():
            if distance <= self._tolerance:
                break
            if (far := self._distance(candidate)) < distance:
                best, distance = candidate, far
        return best

    def _distance(self, model: ModelConfig) -> float:
        return abs(self._cost(model) / self._target - 1)

    def _candidates(self) -> Iterator[ModelConfig]:
        yield from self._rescaled(self._model, FFNS, _FFN_RANGE)
        for model in self._rescaled(self._model, MIXERS, _MIXER_RANGE):
            yield model
            yield from self._rescaled(model, FFNS, _FFN_RANGE)
        for width in _widths(self._model.d_model):
            model = self._model.model_copy(update={"d_model": width})
            if self._legal(model):
                yield model
                yield from self._rescaled(model, FFNS, _FFN_RANGE)
            yield from self._rescaled(model, MIXERS, _MIXER_RANGE)

    def _rescaled(self, model: ModelConfig, kinds: Collection[str], span: float) -> Iterator[ModelConfig]:
        """For each multiple, the nearest model with layers of ``kinds`` at most ``span`` times wider or narrower."""
        used = self._model.kinds.intersection(kinds)  # ``model`` may only become legal when it is rescaled
        for multiple in _MULTIPLES if _widened(model, used, 2.0, 1) != model else ():
            if (found := self._nearest(model, used, span, multiple)) is not None:
                yield found

    def _nearest(self, model: ModelConfig, kinds: Collection[str], span: float, multiple: int) -> ModelConfig | None:
        """None if the range contains illegal models. The cost grows with the width."""
        low, high = 1 / span, span
        ends = _widened(model, kinds, low, multiple), _widened(model, kinds, high, multiple)
        if not all(map(self._legal, ends)):
            return None
        for _ in range(_HALVINGS):
            middle = (low * high) ** 0.5
            candidate = _widened(model, kinds, middle, multiple)
            if candidate in ends or not self._legal(candidate):
                break
            if self._cost(candidate) <= self._target:
                low, ends = middle, (candidate, ends[1])
            else:
                high, ends = middle, (ends[0], candidate)
        return min(ends, key=self._distance)

    def _legal(self, model: ModelConfig) -> bool:
        try:
            dims = _head_dims(model)
        except UserError:
            return False
        return all(now % 8 == 0 or before % 8 for before, now in zip(self._head_dims, dims, strict=True))


def _head_dims(model: ModelConfig) -> list[int]:
    """Channels per head of every layer that has heads. ConfigError: there is no such model."""
    return [spec.params.head_dim for spec in model.layers if hasattr(spec.params, "head_dim")]


def _widths(d_model: int) -> Iterator[int]:
    """Other values of d_model, in the order in which they are tried."""
    for span in _WIDTH_RANGES:
        for multiple in _MULTIPLES[1:]:
            first, last = int(-(-d_model // span // multiple)), int(d_model * span // multiple)
            found = {number * multiple for number in range(first, last + 1)} - {0, d_model}
            yield from sorted(sorted(found), key=lambda width: abs(width - d_model))


def _widened(model: ModelConfig, kinds: Collection[str], factor: float, multiple: int) -> ModelConfig:
    """The layers of ``kinds`` about ``factor`` times as wide."""
    sections: dict[str, LayerSection] = {kind: getattr(model, kind) for kind in kinds}
    return model.model_copy(
        update={kind: section.widened(model, factor, multiple) for kind, section in sections.items()}
    )


def _settings(before: ModelConfig, after: ModelConfig) -> Iterator[tuple[str, int | float | None]]:
    """The fields of ``after`` that differ, with their values."""
    if after.d_model != before.d_model:
        yield "model.d_model", after.d_model
    for kind in (*FFNS, *MIXERS):
        old, new = getattr(before, kind).model_dump(), getattr(after, kind).model_dump()
        yield from ((f"model.{kind}.{name}", value) for name, value in new.items() if value != old[name])


def _note(config: RunConfig, model: ModelConfig, cost: int, target: int) -> str:
    """One line: what changed from what to what, and how close the cost is."""
    changes = []
    for field, value in _settings(config.model, model):
        kind, _, name = field.removeprefix("model.").rpartition(".")
        old, new = _resolved(config.model, kind), _resolved(model, kind)
        was = getattr(getattr(config.model, kind) if kind else config.model, name)
        width = f" ({_width(old)} -> {_width(new)})" if name == "expand" else ""
        changes.append(f"{field} {getattr(old, name) if was is None else was:.5g} -> {value:.5g}{width}")
    by = config.sweep.match or ""
    unit = {"params": "parameters", "flops": "training FLOPs per token"}[by]
    aim = "sweep.target" if config.sweep.target else f"pattern {config.sweep.reference}"
    near = "" if abs(cost / target - 1) <= TOLERANCE[by] else ", the nearest possible"
    return (
        f"{', '.join(changes) or 'nothing to change'}: {cost:,} {unit}, {aim} {target:,},"
        f" {cost / target - 1:+.2%}{near}"
    )


def _resolved(model: ModelConfig, kind: str) -> Spec | None:
    return getattr(model, kind).resolve(model, "") if kind else None


def _width(spec: Any) -> str:
    return f"{spec.n_heads} heads" if hasattr(spec, "n_heads") else f"{spec.d_inner} channels"
