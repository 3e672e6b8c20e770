"""The model section to one fully resolved ``LayerSpec`` per layer, and what is wrong with the sections its layers
use."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hybridlm.config.derive_ffns import derive_mlp, derive_moe
from hybridlm.config.derive_mixers import derive_attention, derive_mamba1, derive_mamba2, derive_mamba3, derive_mla
from hybridlm.config.layers import FFNSpec, LayerSpec, MixerSpec
from hybridlm.config.mixers import MIXER_KINDS
from hybridlm.config.model import ModelConfig
from hybridlm.config.pattern import RESERVED_LETTERS, Letters, parse_pattern, pattern_note
from hybridlm.config.problems import dotted, show, validate
from hybridlm.config.section import Section
from hybridlm.errors import ConfigError

# Each kind's section to its spec. A new layer: its section, its spec in layers.py, its function here, its class in
# model/build.py.
_MIXERS: dict[str, Callable[..., MixerSpec]] = {
    "attention": derive_attention,
    "mamba1": derive_mamba1,
    "mamba2": derive_mamba2,
    "mamba3": derive_mamba3,
    "mla": derive_mla,
}
_FFNS: dict[str, Callable[..., FFNSpec]] = {"mlp": derive_mlp, "moe": derive_moe}


def resolve_layers(model: ModelConfig) -> tuple[LayerSpec, ...]:
    """One ``LayerSpec`` per layer, first to last, every derived number filled in.

    Raises:
        ConfigError: one line for each thing that is wrong with the pattern, the variants, or a section that some layer
        uses.
    """
    letters, sections = _letters(model)
    items = parse_pattern(model.pattern, model.n_layers, letters)
    mixers: dict[str, MixerSpec] = {}
    ffns: dict[str, FFNSpec | None] = {"none": None}
    problems: list[str] = []
    for letter, kind in {item.letter: item.kind for item in items}.items():
        where = f"model.variants.{letter}" if letter in sections else f"model.{kind}"
        try:
            mixers[letter] = _MIXERS[kind](sections.get(letter, getattr(model, kind)), model, where)
        except ConfigError as error:
            problems += error.problems
    for kind in dict.fromkeys(item.ffn for item in items if item.ffn != "none"):
        try:
            ffns[kind] = _FFNS[kind](getattr(model, kind), model)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return tuple(LayerSpec(item.kind, mixers[item.letter], item.ffn, ffns[item.ffn]) for item in items)


def layer_note(model: ModelConfig) -> str | None:
    """One line where ``n_layers`` cuts the pattern's cycle, otherwise None. Raises ConfigError as
    ``resolve_layers``."""
    return pattern_note(model.pattern, model.n_layers, _letters(model)[0])


def kinds_in_use(model: ModelConfig) -> set[str]:
    """The kinds of mixers and FFNs that some layer has. Raises ConfigError where the pattern is wrong."""
    items = parse_pattern(model.pattern, model.n_layers, _letters(model)[0])
    return {item.kind for item in items} | {item.ffn for item in items}


def _letters(model: ModelConfig) -> tuple[Letters, dict[str, Section]]:
    """What each letter means, and the section of each variant: its base section with its changes."""
    kinds: dict[str, str] = {}
    sections: dict[str, Section] = {}
    problems: list[str] = []
    for letter, changes in model.variants.items():
        where = dotted("model.variants", [letter])
        kind = changes.get("mixer")
        if len(letter) != 1 or not "A" <= letter <= "Z" or letter in RESERVED_LETTERS:
            legal = f"one capital letter other than {', '.join(RESERVED_LETTERS)}"
            problems.append(f"{where}: {letter!r} is no name of a variant; legal: {legal}")
        elif not isinstance(kind, str) or kind not in MIXER_KINDS:
            problems.append(f"{where}.mixer = {show(kind)}: not one of {', '.join(MIXER_KINDS)}")
        else:
            kinds[letter] = kind
            try:
                sections[letter] = _variant(getattr(model, kind), changes, where)
            except ConfigError as error:
                problems += error.problems
    if problems:
        raise ConfigError(problems)
    return Letters(model.ssm, model.ffn_after.model_dump(), kinds), sections


def _variant(base: Section, changes: Mapping[str, object], where: str) -> Section:
    return validate(
        type(base), base.model_dump() | {key: value for key, value in changes.items() if key != "mixer"}, where
    )
