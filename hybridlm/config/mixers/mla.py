"""Multi-head latent attention: section and spec."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from pydantic import Field

from hybridlm.config.layers import MixerSection, Spec, Stream
from hybridlm.config.problems import broken


@dataclass(frozen=True)
class MLASpec(Spec):
    """Multi-head latent attention. A token's cache is its latent (``kv_lora_rank``) and one shared key
    (``qk_rope_head_dim``)."""

    layer: ClassVar[str] = "mla.MLA"

    n_heads: int
    kv_lora_rank: int
    q_lora_rank: int | None
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope: bool
    rope_theta: float
    rope_interleave: bool
    scale: float

    def narrowed(self, d_model: int) -> MLASpec:
        kv_rank, q_rank = min(96, self.kv_lora_rank), self.q_lora_rank and min(96, self.q_lora_rank)
        return replace(self, d_model=d_model, n_heads=min(2, self.n_heads), kv_lora_rank=kv_rank, q_lora_rank=q_rank)


class MLAConfig(MixerSection):
    """Multi-head latent attention (``model.mla``); names are those of DeepSeek-V3."""

    title: ClassVar[str] = "multi-head latent attention"
    letter: ClassVar[str] = "L"
    spec: ClassVar[type[Spec]] = MLASpec

    n_heads: int = Field(4, ge=1, description="heads H")
    kv_lora_rank: int | None = Field(
        None, ge=1, description="channels of the latent that is cached; null: d_model / 2, rounded up"
    )
    q_lora_rank: int | None = Field(None, ge=1, description="rank of the queries' projection; null: full rank")
    qk_nope_head_dim: int = Field(48, ge=1, description="channels per head of queries and keys that carry no position")
    qk_rope_head_dim: int = Field(
        16, ge=0, description="channels of the one key that all heads share, rotated where rope is on; 0: none"
    )
    v_head_dim: int = Field(64, ge=1, description="channels per head of values")
    rope: bool = Field(
        True, description="rotary positions on the qk_rope channels; false: no positional encoding (hybrids)"
    )
    rope_theta: float = Field(10_000.0, gt=1, description="base of the rotary frequencies")
    rope_interleave: bool = Field(
        True, description="pairs are neighbours (2i, 2i+1), as DeepSeek has them; false: half-split"
    )
    scale: float | None = Field(
        None, gt=0, description="softmax scale; null: (qk_nope_head_dim + qk_rope_head_dim) ** -0.5"
    )

    def derived(self, model: Stream, where: str) -> tuple[dict[str, Any], list[str]]:
        numbers = {
            "kv_lora_rank": self.kv_lora_rank or math.ceil(model.d_model / 2),
            "scale": self.scale or (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5,
        }
        rule = "rotary positions rotate channel pairs; set an even number of at least 2"
        return numbers, broken(
            (
                self.rope and (self.qk_rope_head_dim % 2 or not self.qk_rope_head_dim),
                f"{where}.qk_rope_head_dim = {self.qk_rope_head_dim}: {rule}, or {where}.rope=false",
            )
        )
