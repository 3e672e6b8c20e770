"""Mixture of experts: a router sends each token to a few experts (Shazeer et al. 2017; Mixtral;
DeepSeek-V3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.layers.ffn import FFN, RouterStats
from hybridlm.layers.init import MATRIX, Init, ParamSpec, fused
from hybridlm.layers.layer import PASSES, Phase, linear_flops
from hybridlm.layers.mlp import MLP
from hybridlm.ops.experts import mixture
from hybridlm.ops.norm import at_least_fp32
from hybridlm.ops.router import Routing, balance_loss, expert_counts, sigmoid_routing, softmax_routing, z_loss

if TYPE_CHECKING:
    from hybridlm.config.ffns.moe import MoESpec


class Router(nn.Linear):
    """Logits of the experts, and the routing that follows from them. Its buffer exists for the sigmoid router only."""

    e_score_correction_bias: Tensor

    def __init__(self, spec: MoESpec) -> None:
        super().__init__(spec.d_model, spec.n_experts, bias=False)
        self.spec = spec
        if spec.router == "sigmoid":
            # Moved after each optimizer step so that loads even out, not by a gradient: state of training, saved with
            # the weights.
            self.register_buffer("e_score_correction_bias", torch.empty(spec.n_experts, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, D). Returns logits (N, E) in at least fp32, also under autocast."""
        wide = at_least_fp32(x.dtype)
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return F.linear(x.to(wide), self.weight.to(wide))
        with torch.autocast(device, enabled=False):
            return F.linear(x.to(wide), self.weight.to(wide))

    def route(self, logits: Tensor) -> Routing:
        """The chosen experts of each token."""
        spec = self.spec
        if spec.router == "softmax":
            return softmax_routing(logits, spec.top_k, normalize=spec.norm_topk_prob, scale=spec.routed_scaling_factor)
        return sigmoid_routing(
            logits,
            self.e_score_correction_bias,
            spec.top_k,
            normalize=spec.norm_topk_prob,
            scale=spec.routed_scaling_factor,
            groups=spec.n_expert_groups,
            kept_groups=spec.topk_groups,
        )


class Experts(nn.Module):
    """The matrices of all experts. Gated ones fuse two of them: the rows of gate_up_proj are [gate, up], for each
    expert."""

    def __init__(self, spec: MoESpec) -> None:
        super().__init__()
        self.gated = spec.activation == "swiglu"
        inner, outer = (spec.n_experts, spec.d_expert, spec.d_model), (spec.n_experts, spec.d_model, spec.d_expert)
        if self.gated:
            self.gate_up_proj = nn.Parameter(torch.empty(inner[0], 2 * inner[1], inner[2]))
        else:
            self.up_proj = nn.Parameter(torch.empty(inner))
        self.down_proj = nn.Parameter(torch.empty(outer))

    @property
    def first(self) -> Tensor:
        """The projection out of the residual stream: (E, 2 I, D), or (E, I, D) of experts without a gate."""
        return self.gate_up_proj if self.gated else self.up_proj

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """x: (N, D). Returns (N, D), in autocast's dtype where that is on, as from a Linear."""
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        return mixture(
            x, routing.experts, routing.weights, self.first.to(x.dtype), self.down_proj.to(x.dtype), gated=self.gated
        )

    def reset_parameters(self, init: Init) -> None:
        init.matrix(self.first)
        init.residual_matrix(self.down_proj)


class MoE(FFN):
    """Each token's ``top_k`` of ``n_experts`` experts, weighted, and the shared experts, which every token goes to.

    No token is ever dropped, so what one token gets does not depend on the others: padding needs no care but in the
    statistics.
    """

    def __init__(self, spec: MoESpec) -> None:
        super().__init__()
        self.spec = spec
        self.n_experts, self.top_k = spec.n_experts, spec.top_k
        self.balancing = "moe.bias_update_rate" if spec.router == "sigmoid" else "moe.balance_loss_weight"
        self.gate = Router(spec)
        self.experts = Experts(spec)
        self.shared_experts = None if spec.shared is None else MLP(spec.shared)
        self.shared_gate = nn.Linear(spec.d_model, 1, bias=False) if spec.shared_gate else None

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, RouterStats | None]:
        tokens = x.flatten(0, 1)  # (N, D)
        logits = self.gate(tokens)
        routing = self.gate.route(logits)
        y: Tensor = self.experts(tokens, routing).view(x.shape)
        if self.shared_experts is not None:
            shared = self.shared_experts(x)[0]
            y = y + (shared if self.shared_gate is None else self.shared_gate(x).sigmoid() * shared)
        return y, self._stats(logits, routing, None if valid is None else valid.flatten())

    def _stats(self, logits: Tensor, routing: Routing, valid: Tensor | None) -> RouterStats:
        counts = expert_counts(routing.experts, self.spec.n_experts, valid)
        balance, z = balance_loss(routing.probabilities, counts, valid), z_loss(logits, valid)
        return RouterStats(balance, z, self.spec.balance_loss_weight * balance + self.spec.z_loss_weight * z, counts)

    def flops(self, phase: Phase) -> float:
        routed = 2.0 * self.spec.top_k * (self.experts.first[0].numel() + self.experts.down_proj[0].numel())
        shared = 0.0 if self.shared_experts is None else self.shared_experts.flops(phase)
        gates = linear_flops(self.gate) + (0.0 if self.shared_gate is None else linear_flops(self.shared_gate))
        return PASSES[phase] * (gates + routed) + shared

    def reset_parameters(self, init: Init) -> None:
        super().reset_parameters(init)
        if self.spec.router == "sigmoid":
            nn.init.zeros_(self.gate.e_score_correction_bias)

    def param_specs(self) -> dict[str, ParamSpec]:
        # The router is AdamW's under every optimizer: an orthogonalised update moves all directions equally, including
        # those of experts that the gradient has nothing to say about, and every such move changes which experts win.
        # Decay keeps its logits from growing to where the choice no longer changes; rounding its weights would change
        # choices.
        experts = dict.fromkeys((f"experts.{name}" for name, _ in self.experts.named_parameters()), MATRIX)
        if self.experts.gated:
            experts["experts.gate_up_proj"] = fused(self.spec.d_expert, self.spec.d_expert)
        gate = ParamSpec(decay=True, role="vector", dtype="fp32")
        gates = {"gate.weight": gate} | ({} if self.shared_gate is None else {"shared_gate.weight": gate})
        return super().param_specs() | experts | gates

    def balance(self, counts: Tensor) -> None:
        if self.spec.router == "sigmoid" and self.spec.bias_update_rate > 0:
            move_bias(self.gate.e_score_correction_bias, counts, self.spec.bias_update_rate)


@torch.no_grad()
def move_bias(bias: Tensor, counts: Tensor, rate: float) -> None:
    """One step of DeepSeek-V3's balancing without a loss (Wang et al. 2024): ``bias += rate * sign(mean(counts) -
    counts)``, centred.

    bias, counts: (E,). The choice of experts depends on differences of biases only, but signs need not sum to zero:
    where few experts have most of the load, a bias that is not centred grows without end, and float32 loses the
    differences that matter.
    """
    load = counts.double()
    step = rate * torch.sign(load.mean() - load)
    bias.add_((step - step.mean()).to(bias.dtype))
