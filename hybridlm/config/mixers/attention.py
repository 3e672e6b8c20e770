"""Grouped-query attention: section and spec."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from pydantic import Field

from hybridlm.config.layers import MixerSection, Spec, Stream, divisors
from hybridlm.config.problems import broken


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
    rope_dim: int  # the first channels of a head, which are rotated
    qk_norm: bool
    window: int | None
    scale: float
    gate: bool
    norm_eps: float

    def narrowed(self, d_model: int) -> AttentionSpec:
        groups = min(2, self.n_kv_heads)
        per_group = min(2, self.n_heads // self.n_kv_heads)
        return replace(self, d_model=d_model, n_heads=groups * per_group, n_kv_heads=groups)


class AttentionConfig(MixerSection):
    """Grouped-query attention (``model.attention``)."""

    title: ClassVar[str] = "attention"
    letter: ClassVar[str] = "T"
    word: ClassVar[str | None] = "transformer"
    spec: ClassVar[type[Spec]] = AttentionSpec

    n_heads: int = Field(4, ge=1, description="query heads")
    n_kv_heads: int | None = Field(None, ge=1, description="key/value heads; null: as many as n_heads")
    head_dim: int | None = Field(None, ge=1, description="channels per head; null: d_model / n_heads")
    rope: bool | None = Field(
        False,
        description="rotary positions; false: no positional encoding (hybrids); null: where no layer is a Mamba, whose"
        " state carries the order",
    )
    rope_theta: float = Field(10_000.0, gt=1, description="base of the rotary frequencies")
    rope_fraction: float = Field(
        1.0, gt=0, le=1, description="share of a head's channels that are rotated, the first ones (Bamba: 0.5)"
    )
    qk_norm: bool | None = Field(
        False,
        description="RMSNorm over each query and key head before the rotation (Qwen3); null: beside gated DeltaNet"
        " (Qwen3.5)",
    )
    window: int | None = Field(
        None, ge=1, description="sliding window in tokens, the token itself included; null: all of the past"
    )
    scale: float | None = Field(None, gt=0, description="softmax scale; null: head_dim ** -0.5")
    gate: bool = Field(False, description="the heads' output is multiplied by a sigmoid gate per channel (Qwen3-Next)")

    def derived(self, model: Stream, where: str) -> tuple[dict[str, Any], list[str]]:
        kv, head_dim = self.n_kv_heads or self.n_heads, self.head_dim or model.d_model // self.n_heads
        heads = f"{where}.n_heads = {self.n_heads}"
        rope_dim = int(self.rope_fraction * head_dim)
        unequal = self.head_dim is None and model.d_model % self.n_heads
        rope = self.rope if self.rope is not None else not any(one.keeps_order for one in model.mixers)
        qk_norm = self.qk_norm if self.qk_norm is not None else any(one.with_qk_norm for one in model.mixers)
        problems = broken(
            (
                self.n_heads % kv,
                f"{where}.n_kv_heads = {kv}: does not divide {heads}; nearest divisors: {divisors(self.n_heads, kv)}",
            ),
            (
                unequal,
                f"{heads}: does not divide model.d_model = {model.d_model}; nearest divisors:"
                f" {divisors(model.d_model, self.n_heads)}; or set {where}.head_dim",
            ),
            (
                rope and head_dim % 2 and not unequal,
                f"{where}.head_dim = {head_dim}{'' if self.head_dim else ' (d_model / n_heads)'}: rotary positions"
                f" rotate channel pairs; set an even head_dim, or {where}.rope=false",
            ),
            (
                rope and not head_dim % 2 and (rope_dim < 2 or rope_dim % 2),
                f"{where}.rope_fraction = {self.rope_fraction:g}: {self.rope_fraction * head_dim:g} of {head_dim}"
                " channels are not pairs to rotate",
            ),
        )
        scale = self.scale or max(1, head_dim) ** -0.5  # 0 is refused: more heads than channels
        numbers = {"n_kv_heads": kv, "head_dim": head_dim, "rope_dim": rope_dim, "scale": scale}
        return numbers | {"rope": rope, "qk_norm": qk_norm}, problems
