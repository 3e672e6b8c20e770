"""The dense feed-forward network: section and spec."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from pydantic import Field

from hybridlm.config.layers import FFNSection, Spec, Stream, rounded


@dataclass(frozen=True)
class MLPSpec(Spec):
    """Dense feed-forward of width ``d_ff``: SwiGLU (three matrices) or squared ReLU (two), no biases."""

    layer: ClassVar[str] = "mlp.MLP"

    d_ff: int
    activation: Literal["swiglu", "relu2"]

    def narrowed(self, d_model: int) -> MLPSpec:
        return replace(self, d_model=d_model, d_ff=min(256, self.d_ff))


class MLPConfig(FFNSection):
    """Dense feed-forward (``model.mlp``)."""

    title: ClassVar[str] = "dense feed-forward"
    spec: ClassVar[type[Spec]] = MLPSpec

    d_ff: int | None = Field(
        None, ge=1, description="hidden width; null: expand * d_model rounded up to a multiple of multiple_of"
    )
    expand: float = Field(8 / 3, gt=0, description="hidden width as a multiple of d_model where d_ff is null")
    multiple_of: int = Field(
        32, ge=1, description="a derived d_ff is rounded up to a multiple of this (256 for llama.cpp's 4-bit types)"
    )
    activation: Literal["swiglu", "relu2"] = Field(
        "swiglu", description="swiglu (three matrices) or squared ReLU (two)"
    )

    def derived(self, model: Stream, where: str) -> tuple[dict[str, Any], list[str]]:
        return {"d_ff": self.d_ff or hidden_width(self.expand, model.d_model, self.multiple_of)}, []

    def widened(self, model: Stream, factor: float, multiple: int) -> MLPConfig:
        return self.model_copy(update={"d_ff": rounded(self.resolve(model, "").d_ff * factor, multiple)})


def hidden_width(expand: float, d_model: int, multiple: int) -> int:
    """expand x d_model, rounded up to a multiple."""
    multiples = math.ceil(round(expand * d_model / multiple, 6))  # 8/3 x 384 is 1024, not 1056
    return max(1, multiples) * multiple
