"""How fresh weights are drawn, and what every parameter declares about itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Role = Literal["matrix", "vector", "embedding", "head"]


@dataclass(frozen=True)
class ParamSpec:
    """What a module says of one of its parameters; optimizer groups, precision and sharding read only this.

    decay: whether weight decay applies. role: what it is to an optimizer. row_blocks: sizes of the independent row blocks of a fused
    projection (empty: one block). dtype: "fp32" where the parameter must not be rounded (decay rates, step biases).
    """

    decay: bool
    role: Role
    row_blocks: tuple[int, ...] = ()
    dtype: Literal["fp32", "model"] = "model"


MATRIX = ParamSpec(decay=True, role="matrix")
VECTOR = ParamSpec(decay=False, role="vector")
VECTOR_FP32 = ParamSpec(decay=False, role="vector", dtype="fp32")


@dataclass(frozen=True)
class Init:
    """The recipe for fresh weights, resolved once per model and handed to every ``reset_parameters``."""

    std: float | None  # of projections; None: fan_in ** -0.5
    residual: Literal["depth", "zero", "none"]
    n_layers: int

    def linear(self, layer: nn.Linear) -> None:
        """A projection inside a block."""
        nn.init.normal_(layer.weight, std=self._std(layer))

    def residual_linear(self, layer: nn.Linear) -> None:
        """A projection back into the residual stream: smaller with depth, so that the stream's variance does not grow with it."""
        match self.residual:
            case "zero":
                nn.init.zeros_(layer.weight)
            case "depth":  # two additions per layer: mixer and FFN (GPT-2)
                nn.init.normal_(layer.weight, std=self._std(layer) / math.sqrt(2 * self.n_layers))
            case "none":
                nn.init.normal_(layer.weight, std=self._std(layer))

    def _std(self, layer: nn.Linear) -> float:
        return float(layer.in_features**-0.5 if self.std is None else self.std)


def log_uniform_(tensor: Tensor, low: float, high: float) -> Tensor:
    """Fills with exp(U(log low, log high))."""
    with torch.no_grad():
        return tensor.uniform_(math.log(low), math.log(high)).exp_()


def inverse_softplus(x: Tensor) -> Tensor:
    """y with softplus(y) = x, for x > 0, without overflow."""
    return x + torch.log(-torch.expm1(-x))
