"""The model section to one fully resolved ``LayerSpec`` per layer, and what is wrong with the sections its layers
use."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybridlm.config.ffns import FFNS
from hybridlm.config.layers import LayerSection, LayerSpec, MixerSection, Spec
from hybridlm.config.mixers import MIXERS
from hybridlm.config.pattern import RESERVED_LETTERS, Letters, PatternItem, parse
from hybridlm.config.problems import dotted, show, validate
from hybridlm.errors import ConfigError

if TYPE_CHECKING:
    from hybridlm.config.model import ModelConfig


@dataclass(frozen=True)
class _Around:
    """A model before its layers are resolved."""

    d_model: int
    norm_eps: float
    mixers: frozenset[type[MixerSection]]


def resolve(model: ModelConfig) -> tuple[tuple[LayerSpec, ...], str | None]:
    """One ``LayerSpec`` per layer, first to last, every derived number filled in; and a line where ``n_layers`` cuts
    the pattern's cycle or leaves a share without a layer. ``ModelConfig`` asks once and keeps the answer.

    Raises:
        ConfigError: one line for each thing that is wrong with the pattern, the variants, or a section that some layer
        uses.
    """
    variants = _variants(model)
    kinds = {letter: str(model.variants[letter]["mixer"]) for letter in variants}
    items, note = parse(model.pattern, model.n_layers, Letters(model.ssm, model.ffn_after.model_dump(), kinds))

    def path(item: PatternItem) -> str:
        return f"model.variants.{item.letter}" if item.letter in variants else f"model.{item.kind}"

    sections: dict[str, LayerSection] = {
        path(item): variants.get(item.letter) or getattr(model, item.kind) for item in items
    }
    sections |= {f"model.{item.ffn}": getattr(model, item.ffn) for item in items if item.ffn in FFNS}
    around = _Around(model.d_model, model.norm_eps, frozenset(MIXERS[item.kind] for item in items))
    specs: dict[str, Spec] = {}
    problems: list[str] = []
    for where, section in sections.items():
        try:
            specs[where] = section.resolve(around, where)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    layers = (
        LayerSpec(item.kind, specs[path(item)], item.ffn, specs.get(f"model.{item.ffn}"), item.letter) for item in items
    )
    return tuple(layers), note


def _variants(model: ModelConfig) -> dict[str, MixerSection]:
    """The section of each variant: its base section with its changes."""
    sections: dict[str, MixerSection] = {}
    problems: list[str] = []
    legal = f"one capital letter other than {', '.join(RESERVED_LETTERS)}"
    for letter, changes in model.variants.items():
        where = dotted("model.variants", [letter])
        kind, fields = changes.get("mixer"), {key: value for key, value in changes.items() if key != "mixer"}
        if not re.fullmatch("[A-Z]", letter) or letter in RESERVED_LETTERS:
            problems.append(f"{where}: {letter!r} cannot name a variant; legal: {legal}")
        elif not isinstance(kind, str) or kind not in MIXERS:
            problems.append(f"{where}.mixer = {show(kind)}: not one of {', '.join(MIXERS)}")
        else:
            try:
                sections[letter] = validate(MIXERS[kind], getattr(model, kind).model_dump() | fields, where)
            except ConfigError as error:
                problems += error.problems
    if problems:
        raise ConfigError(problems)
    return sections
