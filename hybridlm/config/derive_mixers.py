"""From a mixer's section to its spec: every derived number, and what is wrong with the section. ``where`` is the
section's path."""

from __future__ import annotations

import math

from hybridlm.config.layers import AttentionSpec, Mamba1Spec, Mamba2Spec, Mamba3Spec, MLASpec
from hybridlm.config.mixers import AttentionConfig, Mamba1Config, Mamba2Config, Mamba3Config, MLAConfig
from hybridlm.config.model import ModelConfig
from hybridlm.config.problems import show
from hybridlm.config.section import Section
from hybridlm.errors import ConfigError


def divisors(number: int, near: int) -> str:
    """The divisors of ``number`` next to ``near``, as text."""
    found = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    found = sorted({*found, *(number // d for d in found)})
    below, above = [d for d in found if d < near], [d for d in found if d > near]
    return " and ".join(str(d) for d in [*below[-1:], *above[:1]])


def _width(expand: float, model: ModelConfig, where: str) -> tuple[int, list[str]]:
    """d_inner = expand x d_model, a whole number."""
    product = expand * model.d_model
    d_inner = round(product)
    if d_inner < 1 or not math.isclose(d_inner, product, rel_tol=1e-9):
        shown = f"expand x d_model = {expand:g} x {model.d_model} = {product:g}"
        return 1, [f"{where}.expand = {expand:g}: {shown} is not a whole number of channels"]
    return d_inner, []


def _heads(section: Mamba2Config | Mamba3Config, model: ModelConfig, where: str) -> tuple[int, list[str]]:
    """The heads that expand x d_model channels make, and what is wrong with heads and groups."""
    d_inner, problems = _width(section.expand, model, where)
    if problems:
        return 1, problems
    product = f"{section.expand:g} x {model.d_model} = {d_inner}"
    n_heads = section.n_heads or max(1, d_inner // section.head_dim)
    if section.n_heads is None and d_inner % section.head_dim:
        legal = f"nearest divisors: {divisors(d_inner, section.head_dim)}"
        problems = [
            f"{where}.head_dim = {section.head_dim}: expand x d_model = {product} is not a multiple of"
            f" {section.head_dim}; {legal}"
        ]
    elif n_heads * section.head_dim != d_inner:
        has = f"n_heads x head_dim = {n_heads} x {section.head_dim} = {n_heads * section.head_dim}"
        problems = [f"{where}.n_heads = {n_heads}: {has}, but expand x d_model = {product}; null derives n_heads"]
    elif n_heads % section.n_groups:
        legal = divisors(n_heads, section.n_groups)
        problems = [
            f"{where}.n_groups = {section.n_groups}: does not divide the {n_heads} heads; nearest divisors: {legal}"
        ]
    return n_heads, problems


def _ranges(section: Section, where: str, *names: str) -> list[str]:
    """What is wrong with fields that hold [low, high] of a distribution of positive numbers."""
    return [
        f"{where}.{name} = {show(pair)}: expected [low, high] with 0 < low <= high"
        for name in names
        if not 0 < (pair := getattr(section, name))[0] <= pair[1]
    ]


def derive_attention(section: AttentionConfig, model: ModelConfig, where: str) -> AttentionSpec:
    """Attention with its derived numbers; ``where`` is the section's path. Raises ConfigError."""
    problems = []
    n_kv_heads = section.n_kv_heads or section.n_heads
    if section.n_heads % n_kv_heads:
        legal = divisors(section.n_heads, n_kv_heads)
        heads = f"{where}.n_heads = {section.n_heads}"
        problems.append(f"{where}.n_kv_heads = {n_kv_heads}: does not divide {heads}; nearest that do: {legal}")
    head_dim = section.head_dim or model.d_model // section.n_heads
    if section.head_dim is None and model.d_model % section.n_heads:
        problems.append(
            f"{where}.n_heads = {section.n_heads}: does not divide model.d_model = {model.d_model}; "
            f"nearest that do: {divisors(model.d_model, section.n_heads)}; or set {where}.head_dim"
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


def derive_mamba2(section: Mamba2Config, model: ModelConfig, where: str) -> Mamba2Spec:
    """Mamba-2 with its derived numbers; ``where`` is the section's path. Raises ConfigError."""
    n_heads, problems = _heads(section, model, where)
    problems += _ranges(section, where, "dt_range", "a_range")
    if not 0 <= section.dt_limit[0] < section.dt_limit[1]:
        problems.append(
            f"{where}.dt_limit = {show(section.dt_limit)}: expected [low, high] with 0 <= low < high; high may be .inf"
        )
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


def derive_mamba1(section: Mamba1Config, model: ModelConfig, where: str) -> Mamba1Spec:
    """Mamba-1 with its derived numbers. Raises ConfigError."""
    d_inner, problems = _width(section.expand, model, where)
    problems += _ranges(section, where, "dt_range")
    if problems:
        raise ConfigError(problems)
    return Mamba1Spec(
        d_model=model.d_model,
        d_inner=d_inner,
        d_state=section.d_state,
        d_conv=section.d_conv,
        dt_rank=section.dt_rank or math.ceil(model.d_model / 16),
        bias=section.bias,
        chunk=section.chunk,
        dt_range=section.dt_range,
    )


def derive_mamba3(section: Mamba3Config, model: ModelConfig, where: str) -> Mamba3Spec:
    """Mamba-3 with its derived numbers. Raises ConfigError."""
    n_heads, problems = _heads(section, model, where)
    problems += _ranges(section, where, "dt_range")
    if section.rope_fraction not in (0.5, 1.0):
        problems.append(f"{where}.rope_fraction = {section.rope_fraction:g}: expected 0.5 or 1.0")
    elif section.complex_rope and int(section.d_state * section.rope_fraction) < 2:
        problems.append(
            f"{where}.d_state = {section.d_state}: rope_fraction {section.rope_fraction:g} of it is less than one pair"
            " to rotate"
        )
    elif section.complex_rope and section.mimo_rank and section.d_state % 2:
        problems.append(
            f"{where}.d_state = {section.d_state}: the MIMO form rotates channel i with i + d_state / 2; take an even"
            " d_state"
        )
    if problems:
        raise ConfigError(problems)
    return Mamba3Spec(
        d_model=model.d_model,
        n_heads=n_heads,
        head_dim=section.head_dim,
        d_state=section.d_state,
        n_groups=section.n_groups,
        mimo_rank=section.mimo_rank,
        chunk=section.chunk or max(1, 64 // (section.mimo_rank or 1)),
        complex_rope=section.complex_rope,
        rope_fraction=section.rope_fraction,
        trapezoidal=section.trapezoidal,
        use_conv=section.use_conv,
        d_conv=section.d_conv,
        a_activation=section.a_activation,
        a_floor=section.a_floor,
        outproj_norm=section.outproj_norm,
        dt_range=section.dt_range,
        norm_eps=model.norm_eps,
    )


def derive_mla(section: MLAConfig, model: ModelConfig, where: str) -> MLASpec:
    """Multi-head latent attention with its derived numbers. Raises ConfigError."""
    if section.rope and (section.qk_rope_head_dim % 2 or not section.qk_rope_head_dim):
        rule = "rotary positions turn pairs of channels; set an even number of at least 2"
        raise ConfigError(f"{where}.qk_rope_head_dim = {section.qk_rope_head_dim}: {rule}, or {where}.rope=false")
    return MLASpec(
        d_model=model.d_model,
        n_heads=section.n_heads,
        kv_lora_rank=section.kv_lora_rank or math.ceil(model.d_model / 2),
        q_lora_rank=section.q_lora_rank,
        qk_nope_head_dim=section.qk_nope_head_dim,
        qk_rope_head_dim=section.qk_rope_head_dim,
        v_head_dim=section.v_head_dim,
        rope=section.rope,
        rope_theta=section.rope_theta,
        rope_interleave=section.rope_interleave,
        scale=section.scale or (section.qk_nope_head_dim + section.qk_rope_head_dim) ** -0.5,
    )
