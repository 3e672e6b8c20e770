"""The model section to one fully resolved ``LayerSpec`` per layer, and what is wrong with the sections its layers use."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from hybridlm.config.layers import AttentionSpec, FFNSpec, LayerSpec, Mamba2Spec, MixerSpec, MLPSpec
from hybridlm.config.model import MIXER_KINDS, AttentionConfig, Mamba2Config, MLPConfig, ModelConfig
from hybridlm.config.pattern import RESERVED_LETTERS, Letters, PatternItem, parse_pattern, pattern_note
from hybridlm.config.problems import dotted, show, validate
from hybridlm.config.section import ConfigError, Section

# Kinds of the grammar that can be built. A new layer: its name here, its section in model.py, its spec in layers.py, its resolver below.
BUILT_MIXERS = ("attention", "mamba2")
BUILT_FFNS = ("none", "mlp")
MLP_MULTIPLE = 32  # a derived d_ff is rounded up to this


def resolve_layers(model: ModelConfig) -> tuple[LayerSpec, ...]:
    """One ``LayerSpec`` per layer, first to last, every derived number filled in.

    Raises:
        ConfigError: one line for each thing that is wrong with the pattern, the variants, or a section that some layer uses.
    """
    letters, sections = _letters(model)
    items = parse_pattern(model.pattern, model.n_layers, letters)
    problems = _unbuilt(items)
    mixers: dict[str, MixerSpec] = {}
    for letter, kind in {item.letter: item.kind for item in items if item.kind in BUILT_MIXERS}.items():
        where = f"model.variants.{letter}" if letter in sections else f"model.{kind}"
        try:
            mixers[letter] = _RESOLVERS[kind](sections.get(letter, getattr(model, kind)), model, where)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    ffns: dict[str, FFNSpec | None] = {"none": None, "mlp": resolve_mlp(model.mlp, model)}
    return tuple(LayerSpec(item.kind, mixers[item.letter], item.ffn, ffns[item.ffn]) for item in items)


def layer_note(model: ModelConfig) -> str | None:
    """One line where ``n_layers`` cuts the pattern's cycle, otherwise None. Raises ConfigError as ``resolve_layers``."""
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
            if kind in BUILT_MIXERS:
                try:
                    sections[letter] = _variant(getattr(model, kind), changes, where)
                except ConfigError as error:
                    problems += error.problems
    if problems:
        raise ConfigError(problems)
    return Letters(model.ssm, model.ffn_after.model_dump(), kinds), sections


def _variant(base: Section, changes: Mapping[str, object], where: str) -> Section:
    return validate(type(base), base.model_dump() | {key: value for key, value in changes.items() if key != "mixer"}, where)


def _unbuilt(items: tuple[PatternItem, ...]) -> list[str]:
    problems: dict[str, str] = {}  # the first layer of each kind is enough
    for index, item in enumerate(items):
        if item.kind not in BUILT_MIXERS:
            what = f"layer {index} ({item.letter}) is {item.kind}"
            problems.setdefault(item.kind, f"model.pattern: {what}, which is not built yet; available: {', '.join(BUILT_MIXERS)}")
        if item.ffn not in BUILT_FFNS:
            what = f"the FFN of layer {index} ({item.letter}) is {item.ffn}"
            problems.setdefault(item.ffn, f"model.pattern: {what}, which is not built yet; available: {', '.join(BUILT_FFNS)}")
    return list(problems.values())


def resolve_attention(section: AttentionConfig, model: ModelConfig, where: str) -> AttentionSpec:
    """Attention with its derived numbers; ``where`` is the section's path. Raises ConfigError."""
    problems = []
    n_kv_heads = section.n_kv_heads or section.n_heads
    if section.n_heads % n_kv_heads:
        legal = _divisors(section.n_heads, n_kv_heads)
        heads = f"{where}.n_heads = {section.n_heads}"
        problems.append(f"{where}.n_kv_heads = {n_kv_heads}: does not divide {heads}; nearest that do: {legal}")
    head_dim = section.head_dim or model.d_model // section.n_heads
    if section.head_dim is None and model.d_model % section.n_heads:
        problems.append(
            f"{where}.n_heads = {section.n_heads}: does not divide model.d_model = {model.d_model}; "
            f"nearest that do: {_divisors(model.d_model, section.n_heads)}; or set {where}.head_dim"
        )
    elif section.rope and head_dim % 2:
        derived = "" if section.head_dim else " (d_model / n_heads)"
        remedy = f"set an even head_dim, or {where}.rope=false"
        problems.append(f"{where}.head_dim = {head_dim}{derived}: rotary positions turn pairs of channels; {remedy}")
    if problems:
        raise ConfigError(problems)
    return AttentionSpec(
        d_model=model.d_model,
        n_heads=section.n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        rope=section.rope,
        rope_theta=section.rope_theta,
        qk_norm=section.qk_norm,
        window=section.window,
        scale=section.scale or head_dim**-0.5,
        norm_eps=model.norm_eps,
    )


def resolve_mamba2(section: Mamba2Config, model: ModelConfig, where: str) -> Mamba2Spec:
    """Mamba-2 with its derived numbers; ``where`` is the section's path. Raises ConfigError."""
    problems = []
    d_inner = round(section.expand * model.d_model)
    product = f"{section.expand:g} x {model.d_model} = {section.expand * model.d_model:g}"
    n_heads = section.n_heads or max(1, d_inner // section.head_dim)
    if d_inner < 1 or not math.isclose(d_inner, section.expand * model.d_model, rel_tol=1e-9):
        problems.append(f"{where}.expand = {section.expand:g}: expand x d_model = {product} is not a whole number of channels")
    elif section.n_heads is None and d_inner % section.head_dim:
        legal = f"nearest divisors: {_divisors(d_inner, section.head_dim)}"
        problems.append(
            f"{where}.head_dim = {section.head_dim}: expand x d_model = {product} is not a multiple of {section.head_dim}; {legal}"
        )
    elif n_heads * section.head_dim != d_inner:
        has = f"n_heads x head_dim = {n_heads} x {section.head_dim} = {n_heads * section.head_dim}"
        problems.append(f"{where}.n_heads = {n_heads}: {has}, but expand x d_model = {product}; null derives n_heads")
    elif n_heads % section.n_groups:
        legal = _divisors(n_heads, section.n_groups)
        problems.append(f"{where}.n_groups = {section.n_groups}: does not divide the {n_heads} heads; nearest divisors: {legal}")
    for name, (low, high) in (("dt_range", section.dt_range), ("a_range", section.a_range)):
        if not 0 < low <= high:
            problems.append(f"{where}.{name} = {show((low, high))}: expected [low, high] with 0 < low <= high")
    if not 0 <= section.dt_limit[0] < section.dt_limit[1]:
        problems.append(f"{where}.dt_limit = {show(section.dt_limit)}: expected [low, high] with 0 <= low < high; high may be .inf")
    if problems:
        raise ConfigError(problems)
    return Mamba2Spec(
        d_model=model.d_model,
        n_heads=n_heads,
        head_dim=section.head_dim,
        d_state=section.d_state,
        n_groups=section.n_groups,
        d_conv=section.d_conv,
        chunk=section.chunk,
        dt_range=section.dt_range,
        dt_limit=section.dt_limit,
        a_range=section.a_range,
        norm_before_gate=section.norm_before_gate,
        norm_eps=model.norm_eps,
    )


def resolve_mlp(section: MLPConfig, model: ModelConfig) -> MLPSpec:
    """The dense FFN; a derived d_ff is ``expand * d_model`` rounded up to a multiple of 32."""
    derived = math.ceil(round(section.expand * model.d_model / MLP_MULTIPLE, 6)) * MLP_MULTIPLE  # 8/3 x 384 is 1024, not 1056
    return MLPSpec(model.d_model, section.d_ff or max(MLP_MULTIPLE, derived), section.activation)


def _divisors(number: int, near: int) -> str:
    """The divisors of ``number`` next to ``near``, as text."""
    divisors = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    divisors = sorted({*divisors, *(number // d for d in divisors)})
    below, above = [d for d in divisors if d < near], [d for d in divisors if d > near]
    return " and ".join(str(d) for d in [*below[-1:], *above[:1]])


_RESOLVERS: dict[str, Callable[..., MixerSpec]] = {"attention": resolve_attention, "mamba2": resolve_mamba2}
