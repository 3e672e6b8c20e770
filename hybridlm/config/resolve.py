"""The model section to one fully resolved ``LayerSpec`` per layer, and what is wrong with the sections its layers
use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybridlm.config.ffns import FFNS
from hybridlm.config.layers import LayerSection, LayerSpec, MixerSection, Spec
from hybridlm.config.mixers import MIXERS
from hybridlm.config.pattern import RESERVED_LETTERS, Letters, parse
from hybridlm.config.problems import dotted, show, validate
from hybridlm.errors import ConfigError

if TYPE_CHECKING:
    from hybridlm.config.model import ModelConfig


def resolve(model: ModelConfig) -> tuple[tuple[LayerSpec, ...], str | None]:
    """One ``LayerSpec`` per layer, first to last, every derived number filled in; and a line where ``n_layers`` cuts
    the pattern's cycle or leaves a share without a layer. ``ModelConfig`` asks once and keeps the answer.

    Raises:
        ConfigError: one line for each thing that is wrong with the pattern, the variants, or a section that some layer
        uses.
    """
    letters, variants = _letters(model)
    items, note = parse(model.pattern, model.n_layers, letters)
    chosen: dict[str, LayerSection] = {}
    paths: dict[str, str] = {}
    for item in items:
        if item.letter not in paths:
            variant = variants.get(item.letter)
            paths[item.letter] = f"model.{item.kind}" if variant is None else f"model.variants.{item.letter}"
            chosen[paths[item.letter]] = variant or getattr(model, item.kind)
    ffns = [ffn for ffn in dict.fromkeys(item.ffn for item in items) if ffn in FFNS]
    chosen |= {f"model.{ffn}": getattr(model, ffn) for ffn in ffns}
    specs: dict[str, Spec] = {}
    problems: list[str] = []
    for where, section in chosen.items():
        try:
            specs[where] = section.resolve(model, where)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    layers = tuple(
        LayerSpec(item.kind, specs[paths[item.letter]], item.ffn, specs.get(f"model.{item.ffn}")) for item in items
    )
    return layers, note


def _letters(model: ModelConfig) -> tuple[Letters, dict[str, MixerSection]]:
    """What each letter means, and the section of each variant: its base section with its changes."""
    kinds: dict[str, str] = {}
    sections: dict[str, MixerSection] = {}
    problems: list[str] = []
    for letter, changes in model.variants.items():
        where = dotted("model.variants", [letter])
        kind = changes.get("mixer")
        if len(letter) != 1 or not "A" <= letter <= "Z" or letter in RESERVED_LETTERS:
            legal = f"one capital letter other than {', '.join(RESERVED_LETTERS)}"
            problems.append(f"{where}: {letter!r} cannot name a variant; legal: {legal}")
        elif not isinstance(kind, str) or kind not in MIXERS:
            problems.append(f"{where}.mixer = {show(kind)}: not one of {', '.join(MIXERS)}")
        else:
            kinds[letter] = kind
            fields = getattr(model, kind).model_dump() | {key: changes[key] for key in changes if key != "mixer"}
            try:
                sections[letter] = validate(MIXERS[kind], fields, where)
            except ConfigError as error:
                problems += error.problems
    if problems:
        raise ConfigError(problems)
    return Letters(model.ssm, model.ffn_after.model_dump(), kinds), sections
