"""Kimi Delta Attention: section and spec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field

from hybridlm.config.layers import Stream
from hybridlm.config.mixers.gdn import DeltaSection, DeltaSpec


@dataclass(frozen=True)
class KDASpec(DeltaSpec):
    """Kimi Delta Attention: a decay for each channel of each head's keys."""

    layer: ClassVar[str] = "kda.KimiDeltaAttention"

    gate_bias: bool
    lower_bound: float | None


class KDAConfig(DeltaSection):
    """Kimi Delta Attention (``model.kda``)."""

    title: ClassVar[str] = "Kimi Delta Attention"
    letter: ClassVar[str] = "K"
    word: ClassVar[str] = "kda"
    ffn: ClassVar[str] = "mlp"

    gate_bias: bool = Field(False, description="a bias in the output gate (flash-linear-attention has one)")
    lower_bound: float | None = Field(
        None,
        ge=-5,
        lt=0,
        description="lower bound of log decays, made by a sigmoid; null: none, made by softplus",
    )

    def resolve(self, model: Stream, where: str) -> KDASpec:
        n_k_heads, n_v_heads, head_v_dim = self.heads(model, where)
        return KDASpec(
            d_model=model.d_model,
            n_k_heads=n_k_heads,
            n_v_heads=n_v_heads,
            head_k_dim=self.head_k_dim,
            head_v_dim=head_v_dim,
            use_conv=self.use_conv,
            d_conv=self.d_conv,
            allow_neg_eigval=self.allow_neg_eigval,
            chunk=self.chunk,
            dt_range=self.dt_range,
            a_range=self.a_range,
            norm_eps=model.norm_eps,
            gate_bias=self.gate_bias,
            lower_bound=self.lower_bound,
        )
