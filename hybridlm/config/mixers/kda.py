"""Kimi Delta Attention: section and spec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field

from hybridlm.config.layers import Spec
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
    spec: ClassVar[type[Spec]] = KDASpec

    gate_bias: bool = Field(False, description="a bias in the output gate (flash-linear-attention has one)")
    lower_bound: float | None = Field(
        None,
        ge=-5,
        lt=0,
        description="lower bound of log decays, made by a sigmoid; null: none, made by softplus",
    )
