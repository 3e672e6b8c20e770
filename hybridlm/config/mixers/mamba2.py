"""Mamba-2: section and spec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field

from hybridlm.config.layers import Spec, Stream, range_problems
from hybridlm.config.mixers.heads import HeadsSection, HeadsSpec
from hybridlm.config.problems import broken, show
from hybridlm.config.section import Limits, Pair


@dataclass(frozen=True)
class Mamba2Spec(HeadsSpec):
    """Mamba-2 (SSD)."""

    layer: ClassVar[str] = "mamba2.Mamba2"

    dt_limit: tuple[float, float]
    a_range: tuple[float, float]
    norm_before_gate: bool

    @property
    def conv_channels(self) -> int:
        return self.d_inner + 2 * self.n_groups * self.d_state  # [x, B, C]


class Mamba2Config(HeadsSection):
    """Mamba-2 (``model.mamba2``); names are those of mamba_ssm."""

    title: ClassVar[str] = "Mamba-2"
    letter: ClassVar[str] = "M2"
    spec: ClassVar[type[Spec]] = Mamba2Spec
    keeps_order: ClassVar[bool] = True
    ffn: ClassVar[str] = "none"  # the published block has none

    chunk: int = Field(64, ge=1, le=1024, description="chunk length of the SSD scan; changes speed, not results")
    dt_limit: Limits = Field((0.0, float("inf")), description="clamp of the step size, in training and in decode")
    a_range: Pair = Field((1.0, 16.0), description="initial -A, uniform between the two")
    norm_before_gate: bool = Field(
        False, description="false: gate, then norm (Mamba-2); true: norm, then gate (FalconH1)"
    )

    def derived(self, model: Stream, where: str) -> tuple[dict[str, Any], list[str]]:
        numbers, problems = super().derived(model, where)
        limit = f"{where}.dt_limit = {show(self.dt_limit)}"
        problems += range_problems(self, where, "a_range") + broken(
            (
                not 0 <= self.dt_limit[0] < self.dt_limit[1],
                f"{limit}: expected [low, high] with 0 <= low < high; high may be .inf",
            )
        )
        return numbers, problems
