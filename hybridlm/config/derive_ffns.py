"""From an FFN's section to its spec: every derived number, and what is wrong with the section."""

from __future__ import annotations

import math

from hybridlm.config.derive_mixers import divisors
from hybridlm.config.ffns import MLPConfig, MoEConfig
from hybridlm.config.layers import MLPSpec, MoESpec
from hybridlm.config.model import ModelConfig
from hybridlm.errors import ConfigError

WIDTH_MULTIPLE = 32  # a derived hidden width is rounded up to this


def _hidden(expand: float, d_model: int) -> int:
    widths = math.ceil(round(expand * d_model / WIDTH_MULTIPLE, 6))  # 8/3 x 384 is 1024, not 1056
    return max(1, widths) * WIDTH_MULTIPLE


def derive_mlp(section: MLPConfig, model: ModelConfig) -> MLPSpec:
    """The dense FFN; a derived d_ff is ``expand * d_model`` rounded up to a multiple of 32."""
    return MLPSpec(model.d_model, section.d_ff or _hidden(section.expand, model.d_model), section.activation)


def derive_moe(section: MoEConfig, model: ModelConfig) -> MoESpec:
    """The mixture of experts with its derived widths. Raises ConfigError."""
    problems = []
    experts, groups, kept = section.n_experts, section.n_expert_groups, section.topk_groups
    if section.top_k > experts:
        problems.append(f"model.moe.top_k = {section.top_k}: more than model.moe.n_experts = {experts}")
    if experts % groups:
        problems.append(
            f"model.moe.n_expert_groups = {groups}: does not divide the {experts} experts; nearest:"
            f" {divisors(experts, groups)}"
        )
    elif kept > groups:
        problems.append(f"model.moe.topk_groups = {kept}: more than model.moe.n_expert_groups = {groups}")
    elif groups > 1 and section.router == "softmax":
        problems.append(f"model.moe.n_expert_groups = {groups}: groups belong to model.moe.router=sigmoid")
    elif groups > 1 and experts // groups < 2:
        problems.append(
            f"model.moe.n_expert_groups = {groups}: a group's score is the sum of its best two; it needs at least 2"
            " experts"
        )
    elif kept * (experts // groups) < section.top_k <= experts:
        chosen_from = f"{kept} of {groups} groups of {experts // groups}"
        problems.append(
            f"model.moe.top_k = {section.top_k}: more than the {kept * (experts // groups)} experts of {chosen_from}"
        )
    if problems:
        raise ConfigError(problems)
    d_expert = section.d_expert or _hidden(section.expand, model.d_model)
    return MoESpec(
        d_model=model.d_model,
        n_experts=experts,
        top_k=section.top_k,
        d_expert=d_expert,
        d_shared=section.n_shared_experts * d_expert,
        activation=section.activation,
        router=section.router,
        norm_topk_prob=section.norm_topk_prob,
        routed_scaling_factor=section.routed_scaling_factor,
        n_expert_groups=groups,
        topk_groups=kept,
        balance_loss_weight=section.balance_loss_weight,
        z_loss_weight=section.z_loss_weight,
        bias_update_rate=section.bias_update_rate,
    )
