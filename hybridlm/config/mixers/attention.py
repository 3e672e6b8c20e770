"""Grouped-query attention: section and spec."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from pydantic import Field

from hybridlm.config.derive import divisors
from hybridlm.config.layers import MixerSection, Spec, Stream
from hybridlm.errors import ConfigError


@dataclass(frozen=True)
class AttentionSpec(Spec):
    """Grouped-query attention. ``scale`` is the softmax scale; ``window`` counts the token itself (None: all of the
    past)."""

    layer: ClassVar[str] = "attention.Attention"

    n_heads: int
    n_kv_heads: int
    head_dim: int
    rope: bool
    rope_theta: float
    qk_norm: bool
    window: int | None
    scale: float
    norm_eps: float

    def narrowed(self, d_model: int) -> AttentionSpec:
        groups = min(2, self.n_kv_heads)
        per_group = min(2, self.n_heads // self.n_kv_heads)
        return replace(self, d_model=d_model, n_heads=groups * per_group, n_kv_heads=groups)


class AttentionConfig(MixerSection):
    """Grouped-query attention (``model.attention``)."""

    title: ClassVar[str] = "attention"
    letter: ClassVar[str] = "T"
    word: ClassVar[str] = "transformer"
    ffn: ClassVar[str] = "mlp"

    n_heads: int = Field(4, ge=1, description="query heads")
    n_kv_heads: int | None = Field(None, ge=1, description="key/value heads; null: as many as n_heads")
    head_dim: int | None = Field(None, ge=1, description="channels per head; null: d_model / n_heads")
    rope: bool = Field(False, description="rotary positions; false: no positional encoding (hybrids)")
    rope_theta: float = Field(10_000.0, gt=1, description="base of the rotary frequencies")
    qk_norm: bool = Field(False, description="RMSNorm over each query and key head before the rotation (Qwen3)")
    window: int | None = Field(
        None, ge=1, description="sliding window in tokens, the token itself included; null: all of the past"
    )
    scale: float | None = Field(None, gt=0, description="softmax scale; null: head_dim ** -0.5")

    def resolve(self, model: Stream, where: str) -> AttentionSpec:
        problems = []
        n_kv_heads = self.n_kv_heads or self.n_heads
        if self.n_heads % n_kv_heads:
            legal = divisors(self.n_heads, n_kv_heads)
            heads = f"{where}.n_heads = {self.n_heads}"
            problems.append(f"{where}.n_kv_heads = {n_kv_heads}: does not divide {heads}; nearest divisors: {legal}")
        head_dim = self.head_dim or model.d_model // self.n_heads
        if self.head_dim is None and model.d_model % self.n_heads:
            problems.append(
                f"{where}.n_heads = {self.n_heads}: does not divide model.d_model = {model.d_model}; "
                f"nearest divisors: {divisors(model.d_model, self.n_heads)}; or set {where}.head_dim"
            )
        elif self.rope and head_dim % 2:
            derived = "" if self.head_dim else " (d_model / n_heads)"
            remedy = f"set an even head_dim, or {where}.rope=false"
            problems.append(f"{where}.head_dim = {head_dim}{derived}: rotary positions rotate channel pairs; {remedy}")
        if problems:
            raise ConfigError(problems)
        return AttentionSpec(
            d_model=model.d_model,
            n_heads=self.n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            rope=self.rope,
            rope_theta=self.rope_theta,
            qk_norm=self.qk_norm,
            window=self.window,
            scale=self.scale or head_dim**-0.5,
            norm_eps=model.norm_eps,
        )
