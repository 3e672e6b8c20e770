"""Models of equal cost: widths are changed until a pattern has the parameters, or the FLOPs per token, of a reference
pattern.

The hidden width of the FFNs is tried first, then the heads of the SSMs, then d_model, alone before together; the first
that comes within the tolerance is taken, and where none does, the nearest of all. Hidden widths and Mamba-1's inner
channels become multiples of 64, 32, 16 or 8 (the first that suffices), d_model of 32, 16 or 8, and heads of attention
keep a multiple of 8 channels: 8 numbers of 16 bits are the 16 bytes that Tensor Cores want rows to be a multiple of, 64
the 128 bytes with which they are fastest (NVIDIA, Matrix Multiplication Background User's Guide). Heads of Mamba-2 and
-3 keep their width, and their number stays a multiple of the groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

from hybridlm.config.derive_ffns import derive_mlp, derive_moe
from hybridlm.config.layers import AttentionSpec
from hybridlm.config.model import ModelConfig
from hybridlm.config.resolve import kinds_in_use, resolve_layers
from hybridlm.config.run import RunConfig
from hybridlm.errors import UserError
from hybridlm.runs.resume import quoted

if TYPE_CHECKING:
    from hybridlm.sweep.costs import Costs

TOLERANCE = {"params": 0.01, "flops": 0.02}
_MULTIPLES = (64, 32, 16, 8)
_FFN_RANGE, _HEADS_RANGE, _WIDTH_RANGES = (
    16.0,
    4.0,
    (1.25, 4.0),
)  # how many times smaller or larger; d_model is kept near first
_HALVINGS = 24
_DERIVED: dict[str, Callable[[ModelConfig], int]] = {
    "model.mlp.d_ff": lambda model: derive_mlp(model.mlp, model).d_ff,
    "model.moe.d_expert": lambda model: derive_moe(model.moe, model).d_expert,
}
_SSMS = ("model.mamba1.expand", *(f"model.mamba{i}.{name}" for i in (2, 3) for name in ("expand", "n_heads")))
_CHANGED = ("model.d_model", *_DERIVED, *_SSMS)  # the fields that a match may set
_Change = Callable[[ModelConfig, float, int], ModelConfig]  # by a factor, to a multiple


@dataclass(frozen=True)
class Matched:
    """A configuration after the match, and the overrides that make the one before it into this one; none where no match
    was asked for, or the configuration has gone through one."""

    config: RunConfig
    overrides: tuple[str, ...]


def matched(config: RunConfig) -> Matched:
    """``config`` at the cost that ``sweep`` asks for. ConfigError: the tokenizer that gives the vocabulary cannot be
    read."""
    by = config.sweep.match
    if by is None or config.sweep.matched is not None:
        return Matched(config, ())
    from hybridlm.memory.vocabulary import planned_vocabulary
    from hybridlm.sweep.costs import Costs  # counts on a built model, which imports torch

    costs = Costs(by, planned_vocabulary(config).ids, config.data.seq_len)
    target = config.sweep.target or costs.of(_reference(config))
    model = _Search(config.model, costs, target, TOLERANCE[by]).best()
    note = _note(config, model, costs.of(model), target)
    found = config.model_copy(update={"model": model, "sweep": config.sweep.model_copy(update={"matched": note})})
    settings = [f"++{field}={value}" for field, value in _settings(config.model, model)]
    return Matched(found, (*settings, f"++sweep.matched={quoted(note)}"))


def _reference(config: RunConfig) -> ModelConfig:
    """The same model with the reference's pattern, as deep as it is."""
    depth = len(resolve_layers(config.model))
    return config.model.model_copy(update={"pattern": config.sweep.reference, "n_layers": depth})


class _Search:
    """Looks for the model that costs ``target``."""

    def __init__(self, model: ModelConfig, costs: Costs, target: int, tolerance: float) -> None:
        self._model, self._costs, self._target, self._tolerance = model, costs, target, tolerance
        specs = resolve_layers(model)
        self._ffns = any(spec.ffn_kind != "none" for spec in specs)
        self._ssms = any(spec.kind.startswith("mamba") for spec in specs)
        self._even_heads = all(
            spec.params.head_dim % 8 == 0 for spec in specs if isinstance(spec.params, AttentionSpec)
        )

    def best(self) -> ModelConfig:
        """The first within the tolerance, else the nearest."""
        best, distance = self._model, self._distance(self._model)
        if distance <= self._tolerance:
            return best
        for candidate in self._candidates():
            if (far := self._distance(candidate)) < distance:
                best, distance = candidate, far
            if distance <= self._tolerance:
                break
        return best

    def _distance(self, model: ModelConfig) -> float:
        return abs(self._costs.of(model) / self._target - 1)

    def _candidates(self) -> Iterator[ModelConfig]:
        yield from self._with(_with_ffns, self._model, _FFN_RANGE) if self._ffns else ()
        for model in self._with(_with_heads, self._model, _HEADS_RANGE) if self._ssms else ():
            yield model
            yield from self._with(_with_ffns, model, _FFN_RANGE) if self._ffns else ()
        for width in _widths(self._model.d_model):
            model = self._model.model_copy(update={"d_model": width})
            if self._legal(model):
                yield model
                yield from self._with(_with_ffns, model, _FFN_RANGE) if self._ffns else ()
            yield from self._with(_with_heads, model, _HEADS_RANGE) if self._ssms else ()

    def _with(self, change: _Change, model: ModelConfig, span: float) -> Iterator[ModelConfig]:
        """The nearest for each multiple."""
        for multiple in _MULTIPLES:
            if (found := self._nearest(change, model, span, multiple)) is not None:
                yield found

    def _nearest(self, change: _Change, model: ModelConfig, span: float, multiple: int) -> ModelConfig | None:
        """The nearest that ``change`` makes of ``model``, whose cost grows with the factor; None: it makes illegal
        ones."""
        low, high = 1 / span, span
        ends = change(model, low, multiple), change(model, high, multiple)
        if not all(map(self._legal, ends)):
            return None
        for _ in range(_HALVINGS):
            middle = (low * high) ** 0.5
            candidate = change(model, middle, multiple)
            if candidate in ends or not self._legal(candidate):
                break
            if self._costs.of(candidate) <= self._target:
                low, ends = middle, (candidate, ends[1])
            else:
                high, ends = middle, (ends[0], candidate)
        return min(ends, key=self._distance)

    def _legal(self, model: ModelConfig) -> bool:
        try:
            specs = resolve_layers(model)
        except UserError:
            return False
        heads = [spec.params.head_dim for spec in specs if isinstance(spec.params, AttentionSpec)]
        return not self._even_heads or all(width % 8 == 0 for width in heads)


def _widths(d_model: int) -> Iterator[int]:
    """Other values of d_model, in the order in which they are tried."""
    for span in _WIDTH_RANGES:
        for multiple in _MULTIPLES[1:]:
            first, last = -(-d_model // span // multiple), d_model * span // multiple
            found = [int(number) * multiple for number in range(int(first), int(last) + 1)]
            yield from sorted(
                (width for width in found if width not in (0, d_model)), key=lambda width: abs(width - d_model)
            )


def _with_ffns(model: ModelConfig, factor: float, multiple: int) -> ModelConfig:
    """Every FFN ``factor`` times as wide, about."""
    mlp, moe = derive_mlp(model.mlp, model).d_ff, derive_moe(model.moe, model).d_expert
    kinds = kinds_in_use(model)
    update: dict[str, object] = {}
    if "mlp" in kinds:
        update["mlp"] = model.mlp.model_copy(update={"d_ff": _rounded(mlp * factor, multiple)})
    if "moe" in kinds:
        update["moe"] = model.moe.model_copy(update={"d_expert": _rounded(moe * factor, multiple)})
    return model.model_copy(update=update)


def _with_heads(model: ModelConfig, factor: float, multiple: int) -> ModelConfig:
    """Every SSM with ``factor`` times as many heads, about; Mamba-1, which has none, with as many channels."""
    kinds = kinds_in_use(model)
    update: dict[str, object] = {}
    if "mamba1" in kinds:
        channels = _rounded(model.mamba1.expand * model.d_model * factor, multiple)
        update["mamba1"] = model.mamba1.model_copy(update={"expand": channels / model.d_model})
    for kind in kinds & {"mamba2", "mamba3"}:
        section = getattr(model, kind)
        heads = _rounded(
            (section.n_heads or section.expand * model.d_model / section.head_dim) * factor, section.n_groups
        )
        expand = heads * section.head_dim / model.d_model
        update[kind] = section.model_copy(update={"expand": expand, "n_heads": section.n_heads and heads})
    return model.model_copy(update=update)


def _rounded(width: float, multiple: int) -> int:
    return max(1, round(width / multiple)) * multiple


def _settings(before: ModelConfig, after: ModelConfig) -> Iterator[tuple[str, int | float | None]]:
    """The fields of ``after`` that differ, with their values."""
    for field in _CHANGED:
        if (value := _value(after, field)) != _value(before, field):
            yield field, value


def _value(model: ModelConfig, field: str) -> int | float | None:
    """What stands in ``model`` under ``field``, for instance model.mlp.d_ff."""
    _, *path = field.split(".")
    return reduce(getattr, path, model)  # type: ignore[return-value]


def _note(config: RunConfig, model: ModelConfig, cost: int, target: int) -> str:
    """One line: what was changed from what to what, and how near the cost came."""
    changes = []
    for field, value in _settings(config.model, model):
        old = _value(config.model, field) or _DERIVED[field](config.model)
        heads = ""
        if field.endswith(".expand"):
            heads = f" ({' -> '.join(_heads(side, field.split('.')[1]) for side in (config.model, model))})"
        changes.append(f"{field} {old:.5g} -> {value:.5g}{heads}")
    by = config.sweep.match or ""
    unit = {"params": "parameters", "flops": "training FLOPs per token"}[by]
    aim = "sweep.target" if config.sweep.target else f"pattern {config.sweep.reference}"
    near = "" if abs(cost / target - 1) <= TOLERANCE[by] else ", the nearest there is"
    return (
        f"{', '.join(changes) or 'nothing to change'}: {cost:,} {unit}, {aim} {target:,},"
        f" {cost / target - 1:+.2%}{near}"
    )


def _heads(model: ModelConfig, kind: str) -> str:
    section = getattr(model, kind)
    if kind == "mamba1":
        return f"{round(section.expand * model.d_model)} channels"
    return f"{round(section.expand * model.d_model / section.head_dim)} heads"
