"""Dense feed-forward: SwiGLU (Shazeer 2020) or squared ReLU (So et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from hybridlm.layers.ffn import FFN, RouterStats
from hybridlm.layers.layer import PASSES, Phase, linear_flops
from hybridlm.layers.linear import Linear
from hybridlm.ops.linear import linear_of_one

if TYPE_CHECKING:
    from hybridlm.config.ffns.mlp import MLPSpec


class MLP(FFN):
    """``down(silu(gate x) * up x)`` or ``down(relu(up x)^2)``, without biases."""

    def __init__(self, spec: MLPSpec) -> None:
        super().__init__()
        self.gate_proj = Linear(spec.d_model, spec.d_ff, bias=False) if spec.activation == "swiglu" else None
        self.up_proj = Linear(spec.d_model, spec.d_ff, bias=False)
        self.down_proj = Linear(spec.d_ff, spec.d_model, bias=False)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, RouterStats | None]:
        up = self.up_proj(x)
        hidden = F.relu(up).square() if self.gate_proj is None else F.silu(self.gate_proj(x)) * up
        return self.down_proj(hidden), None

    def prepare(self) -> Callable[[Tensor], Tensor]:
        gate = None if self.gate_proj is None else linear_of_one(self.gate_proj.weight)
        up, down = linear_of_one(self.up_proj.weight), linear_of_one(self.down_proj.weight)
        if gate is None:
            return lambda x: down(up(x).relu_().square_())
        return lambda x: down(F.silu(gate(x), inplace=True).mul_(up(x)))

    def flops(self, phase: Phase) -> float:
        return PASSES[phase] * linear_flops(
            *[layer for layer in (self.gate_proj, self.up_proj, self.down_proj) if layer is not None]
        )
