"""Mamba-3: section and spec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field

from hybridlm.config.layers import Spec, Stream
from hybridlm.config.mixers.heads import HeadsSection, HeadsSpec
from hybridlm.config.problems import broken


@dataclass(frozen=True)
class Mamba3Spec(HeadsSpec):
    """Mamba-3. ``mimo_rank`` None is SISO; B and C have ``rank`` x ``n_groups`` x ``d_state`` channels, rank
    slowest."""

    layer: ClassVar[str] = "mamba3.Mamba3"

    mimo_rank: int | None
    complex_rope: bool
    rope_fraction: float
    trapezoidal: bool
    use_conv: bool
    a_activation: Literal["softplus", "heavy_tail"]
    a_floor: float
    outproj_norm: bool

    @property
    def rank(self) -> int:
        return self.mimo_rank or 1

    @property
    def n_angles(self) -> int:
        """Angles per token, shared by all heads: one for each pair of channels that rotates."""
        return int(self.d_state * self.rope_fraction) // 2 if self.complex_rope else 0

    @property
    def conv_channels(self) -> int:
        """Channels of the optional convolution, [x, B, C]; 0 without it."""
        return self.d_inner + 2 * self.rank * self.n_groups * self.d_state if self.use_conv else 0


class Mamba3Config(HeadsSection):
    """Mamba-3, SISO or MIMO (``model.mamba3``); names are those of mamba_ssm."""

    title: ClassVar[str] = "Mamba-3"
    letter: ClassVar[str] = "M3"
    spec: ClassVar[type[Spec]] = Mamba3Spec
    keeps_order: ClassVar[bool] = True
    forms: ClassVar[tuple[dict[str, object], ...]] = ({"mimo_rank": 4},)

    mimo_rank: int | None = Field(
        None, ge=1, description="rank R of the MIMO form; null: SISO (which is not the same as rank 1)"
    )
    chunk: int | None = Field(
        None, ge=1, le=1024, description="chunk length of the scan; null: 64, or 64 / R; changes speed, not results"
    )
    complex_rope: bool = Field(True, description="data-dependent rotation of B and C; false: none (an ablation)")
    rope_fraction: float = Field(0.5, gt=0, le=1, description="share of the state channels that rotate: 0.5 or 1.0")
    trapezoidal: bool = Field(
        True, description="exponential-trapezoidal recurrence; false: Euler, as in Mamba-2 (an ablation)"
    )
    use_conv: bool = Field(False, description="a short causal convolution over [x, B, C], as in Mamba-2")
    a_activation: Literal["softplus", "heavy_tail"] = Field(
        "softplus", description="what makes -A positive: softplus (as released) or heavy_tail"
    )
    a_floor: float = Field(1e-4, gt=0, description="smallest -A")
    outproj_norm: bool = Field(False, description="RMSNorm over each head and rank before the gate")

    def derived(self, model: Stream, where: str) -> tuple[dict[str, Any], list[str]]:
        numbers, problems = super().derived(model, where)
        share, state = self.rope_fraction, f"{where}.d_state = {self.d_state}"
        problems += broken(
            (share not in (0.5, 1.0), f"{where}.rope_fraction = {share:g}: expected 0.5 or 1.0"),
            (
                self.complex_rope and int(self.d_state * share) < 2,
                f"{state}: rope_fraction {share:g} of it is less than one pair of channels to rotate",
            ),
            (
                self.complex_rope and self.mimo_rank and self.d_state % 2,
                f"{state}: the MIMO form rotates channel i with channel i + d_state / 2, so d_state must be even",
            ),
        )[:1]
        return {**numbers, "chunk": self.chunk or max(1, 64 // (self.mimo_rank or 1))}, problems
