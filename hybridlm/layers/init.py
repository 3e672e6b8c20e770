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
    """What a module declares about one of its parameters; optimizer groups, precision and sharding read only this.

    decay: whether weight decay applies. role: how an optimizer treats it. row_blocks: sizes of the independent row
    blocks of a fused projection (empty: one block). dtype: "fp32" where the parameter must not be rounded (decay rates,
    step biases).
    """

    decay: bool
    role: Role
    row_blocks: tuple[int, ...] = ()
    dtype: Literal["fp32", "model"] = "model"


MATRIX = ParamSpec(decay=True, role="matrix")
VECTOR = ParamSpec(decay=False, role="vector")
VECTOR_FP32 = ParamSpec(decay=False, role="vector", dtype="fp32")


def fused(*rows: int) -> ParamSpec:
    """A projection whose rows are several projections stacked."""
    return ParamSpec(decay=True, role="matrix", row_blocks=rows)


def declared(name: str, parameter: Tensor) -> ParamSpec:
    """The declaration of a layer's parameter that its name and shape suggest (``Layer.param_specs``)."""
    if "." not in name:
        return VECTOR_FP32
    # K taps per channel of a convolution are nothing that a matrix optimizer could orthogonalise.
    return MATRIX if parameter.dim() == 2 else VECTOR


@dataclass(frozen=True)
class Init:
    """The recipe for fresh weights, resolved once per model and handed to every ``reset_parameters``."""

    std: float | None  # of projections; None: fan_in ** -0.5
    residual: Literal["depth", "zero", "none"]
    n_layers: int

    def matrix(self, weight: Tensor) -> None:
        """A projection inside a block, (..., rows, fan-in): one, or one of each expert."""
        nn.init.normal_(weight, std=self._std(weight))

    def residual_matrix(self, weight: Tensor) -> None:
        """A projection back into the residual stream: smaller with depth, so that the stream's variance does not grow
        with it."""
        match self.residual:
            case "zero":
                nn.init.zeros_(weight)
            case "depth":  # two additions per layer: mixer and FFN (GPT-2)
                nn.init.normal_(weight, std=self._std(weight) / math.sqrt(2 * self.n_layers))
            case "none":
                nn.init.normal_(weight, std=self._std(weight))

    def _std(self, weight: Tensor) -> float:
        return float(weight.shape[-1] ** -0.5 if self.std is None else self.std)


def reset_convolution(conv: nn.Conv1d) -> None:
    """Torch's own default for a depthwise convolution, whose fan-in is its width."""
    bound = conv.kernel_size[0] ** -0.5
    nn.init.uniform_(conv.weight, -bound, bound)
    if conv.bias is not None:
        nn.init.uniform_(conv.bias, -bound, bound)


@torch.no_grad()
def reset_step_bias(bias: Tensor, dt_range: tuple[float, float]) -> None:
    """Draws step sizes log-uniformly, at least 1e-4, and stores what softplus makes them of (Gu & Dao 2023)."""
    bias.copy_(inverse_softplus(log_uniform_(torch.empty_like(bias), *dt_range).clamp_min_(1e-4)))


def log_uniform_(tensor: Tensor, low: float, high: float) -> Tensor:
    """Fills with exp(U(log low, log high))."""
    with torch.no_grad():
        return tensor.uniform_(math.log(low), math.log(high)).exp_()


def inverse_softplus(x: Tensor) -> Tensor:
    """y with softplus(y) = x, for x > 0, without overflow."""
    return x + torch.log(-torch.expm1(-x))
