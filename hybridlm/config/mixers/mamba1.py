"""Mamba-1: section and spec."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from pydantic import Field

from hybridlm.config.layers import MixerSection, Spec, Stream, inner_channels, range_problems, rounded
from hybridlm.config.section import Pair


@dataclass(frozen=True)
class Mamba1Spec(Spec):
    """Mamba-1 (selective scan): every one of ``d_inner`` channels has ``d_state`` states of its own."""

    layer: ClassVar[str] = "mamba1.Mamba1"

    d_inner: int
    d_state: int
    d_conv: int
    dt_rank: int
    bias: bool
    chunk: int
    dt_range: tuple[float, float]

    def narrowed(self, d_model: int) -> Mamba1Spec:
        return replace(self, d_model=d_model, d_inner=min(512, self.d_inner), dt_rank=min(16, self.dt_rank))


class Mamba1Config(MixerSection):
    """Mamba-1, the selective scan (``model.mamba1``); names are those of mamba_ssm."""

    title: ClassVar[str] = "Mamba-1"
    letter: ClassVar[str] = "M1"
    spec: ClassVar[type[Spec]] = Mamba1Spec
    keeps_order: ClassVar[bool] = True
    ffn: ClassVar[str] = "none"  # the published block has none
    kernel: ClassVar[str | None] = "mamba-ssm"

    d_state: int = Field(16, ge=1, description="state channels N per inner channel")
    d_conv: int = Field(4, ge=1, le=16, description="width K of the short causal convolution")
    expand: float = Field(2, gt=0, description="d_inner / d_model")
    dt_rank: int | None = Field(
        None, ge=1, description="rank of the step size's projection; null: d_model / 16, rounded up"
    )
    bias: bool = Field(False, description="biases of in_proj and out_proj")
    chunk: int = Field(16, ge=1, le=1024, description="chunk length of the scan; changes speed, not results")
    dt_range: Pair = Field((1e-3, 1e-1), description="initial step sizes, log-uniform between the two")

    def derived(self, model: Stream, where: str) -> tuple[dict[str, Any], list[str]]:
        d_inner, problems = inner_channels(self.expand, model.d_model, where)
        numbers = {"d_inner": d_inner, "dt_rank": self.dt_rank or math.ceil(model.d_model / 16)}
        return numbers, problems + range_problems(self, where, "dt_range")

    def widened(self, model: Stream, factor: float, multiple: int) -> Mamba1Config:
        channels = rounded(self.expand * model.d_model * factor, multiple)
        return self.model_copy(update={"expand": channels / model.d_model})
