"""The sections of the feed-forward networks: ``model.mlp`` and ``model.moe``, and which of them follows which mixer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hybridlm.config.section import Section

FFN_KINDS = ("none", "mlp", "moe")
FFNKind = Literal["none", "mlp", "moe"]


class MLPConfig(Section):
    """Dense feed-forward (``model.mlp``)."""

    d_ff: int | None = Field(
        None, ge=1, description="hidden width; null: expand * d_model rounded up to a multiple of 32"
    )
    expand: float = Field(8 / 3, gt=0, description="hidden width as a multiple of d_model where d_ff is null")
    activation: Literal["swiglu", "relu2"] = Field(
        "swiglu", description="swiglu (three matrices) or squared ReLU (two)"
    )


class MoEConfig(Section):
    """Mixture of experts (``model.moe``)."""

    n_experts: int = Field(8, ge=1, description="routed experts E")
    top_k: int = Field(2, ge=1, description="experts that each token goes to")
    d_expert: int | None = Field(
        None, ge=1, description="hidden width of an expert; null: expand * d_model rounded up to a multiple of 32"
    )
    expand: float = Field(
        4 / 3, gt=0, description="hidden width of an expert as a multiple of d_model where d_expert is null"
    )
    n_shared_experts: int = Field(
        0, ge=0, description="experts that every token goes to, as one FFN of their joint width"
    )
    activation: Literal["swiglu", "relu2"] = Field("swiglu", description="of the experts: swiglu or squared ReLU")
    router: Literal["softmax", "sigmoid"] = Field(
        "softmax", description="softmax (Mixtral) or sigmoid with selection bias (DeepSeek-V3)"
    )
    norm_topk_prob: bool = Field(True, description="the weights of the chosen experts are divided by their sum")
    routed_scaling_factor: float = Field(1.0, gt=0, description="multiplies the weights of the chosen experts")
    n_expert_groups: int = Field(
        1, ge=1, description="groups of experts, of which each token keeps topk_groups (sigmoid router)"
    )
    topk_groups: int = Field(1, ge=1, description="groups of experts that a token may choose from")
    balance_loss_weight: float = Field(
        0.01, ge=0, description="weight of the balance loss, which is 1 when all experts are used alike"
    )
    z_loss_weight: float = Field(
        0.001, ge=0, description="weight of the mean squared log-sum-exp of the router's logits"
    )
    bias_update_rate: float = Field(
        1e-3, ge=0, description="step of the selection bias after each optimizer step (sigmoid router); 0: off"
    )


class FFNAfter(Section):
    """Which FFN follows a mixer when the pattern does not say (``model.ffn_after``)."""

    attention: FFNKind = Field("mlp", description="behind attention")
    mamba1: FFNKind = Field("none", description="behind Mamba-1, whose published block has none")
    mamba2: FFNKind = Field("none", description="behind Mamba-2, whose published block has none")
    mamba3: FFNKind = Field("mlp", description="behind Mamba-3")
    mla: FFNKind = Field("mlp", description="behind multi-head latent attention")
