"""The model section: what a user writes about the architecture. Everything here travels in every checkpoint."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from hybridlm.config.section import Limits, Pair, Section, Strings

MIXER_KINDS = ("attention", "mamba1", "mamba2", "mamba3", "mla")
FFN_KINDS = ("none", "mlp", "moe")
MixerKind = Literal["attention", "mamba1", "mamba2", "mamba3", "mla"]
FFNKind = Literal["none", "mlp", "moe"]


class AttentionConfig(Section):
    """Grouped-query attention (``model.attention``)."""

    n_heads: int = Field(4, ge=1, description="query heads")
    n_kv_heads: int | None = Field(None, ge=1, description="key/value heads; null: as many as n_heads")
    head_dim: int | None = Field(None, ge=1, description="channels per head; null: d_model / n_heads")
    rope: bool = Field(False, description="rotary positions; false: no positional encoding (hybrids)")
    rope_theta: float = Field(10_000.0, gt=1, description="base of the rotary frequencies")
    qk_norm: bool = Field(False, description="RMSNorm over each query and key head before the rotation (Qwen3)")
    window: int | None = Field(None, ge=1, description="sliding window in tokens, the token itself included; null: all of the past")
    scale: float | None = Field(None, gt=0, description="softmax scale; null: head_dim ** -0.5")


class Mamba2Config(Section):
    """Mamba-2 (``model.mamba2``); names are those of mamba_ssm."""

    d_state: int = Field(64, ge=1, description="state channels N per head")
    d_conv: int = Field(4, ge=1, le=16, description="width K of the short causal convolution")
    expand: float = Field(2, gt=0, description="d_inner / d_model")
    head_dim: int = Field(64, ge=1, description="channels P per head")
    n_heads: int | None = Field(None, ge=1, description="heads H; null: expand * d_model / head_dim")
    n_groups: int = Field(1, ge=1, description="groups G that share B and C")
    chunk: int = Field(64, ge=1, le=1024, description="chunk length of the SSD scan; changes speed, not results")
    dt_range: Pair = Field((1e-3, 1e-1), description="initial step sizes, log-uniform between the two")
    dt_limit: Limits = Field((0.0, float("inf")), description="clamp of the step size, in training and in decode alike")
    a_range: Pair = Field((1.0, 16.0), description="initial -A, uniform between the two")
    norm_before_gate: bool = Field(False, description="false: gate, then norm (Mamba-2); true: norm, then gate (FalconH1)")


class MLPConfig(Section):
    """Dense feed-forward (``model.mlp``)."""

    d_ff: int | None = Field(None, ge=1, description="hidden width; null: expand * d_model rounded up to a multiple of 32")
    expand: float = Field(8 / 3, gt=0, description="hidden width as a multiple of d_model where d_ff is null")
    activation: Literal["swiglu", "relu2"] = Field("swiglu", description="swiglu (three matrices) or squared ReLU (two)")


class FFNAfter(Section):
    """Which FFN follows a mixer when the pattern does not say (``model.ffn_after``)."""

    attention: FFNKind = "mlp"
    mamba1: FFNKind = "none"
    mamba2: FFNKind = "none"
    mamba3: FFNKind = "mlp"
    mla: FFNKind = "mlp"


class InitConfig(Section):
    """Initial weights (``model.init``)."""

    std: float | None = Field(None, gt=0, description="standard deviation of projections; null: fan_in ** -0.5")
    embedding_std: float = Field(0.02, gt=0, description="standard deviation of the embedding")
    head_std: float | None = Field(None, gt=0, description="standard deviation of an untied head; null: like projections")
    residual: Literal["depth", "zero", "none"] = Field(
        "depth", description="projections back into the residual stream: std / sqrt(2 n_layers), zero, or as all others"
    )


def _pattern_items(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


Pattern = Annotated[str | tuple[str, ...] | None, BeforeValidator(_pattern_items)]


class ModelConfig(Section):
    """The architecture (``model``)."""

    name: str = Field("custom", description="name of the preset, for logs and reports")
    sizes: Strings = Field(("default", "tiny", "small", "d12", "d16", "d20", "d26"), description="the values of `size` this preset takes")
    d_model: int = Field(256, ge=1, description="width D of the residual stream")
    n_layers: int | None = Field(None, ge=1, le=1000, description="layers; null: as long as the pattern")
    pattern: Pattern = Field(None, description="the layers, in the grammar of docs/pattern.md; null: all transformer")
    ssm: Literal["mamba1", "mamba2", "mamba3"] = Field("mamba2", description="what M means in the pattern")
    variants: dict[str, dict[str, object]] = Field({}, description="letters of your own: {S: {mixer: attention, window: 512}}")
    ffn_after: FFNAfter = FFNAfter()
    attention: AttentionConfig = AttentionConfig()
    mamba2: Mamba2Config = Mamba2Config()
    mlp: MLPConfig = MLPConfig()
    init: InitConfig = InitConfig()
    vocab_size: int | None = Field(None, ge=2, description="token ids the model knows; null: the tokenizer's")
    vocab_multiple: int = Field(64, ge=1, description="the embedding is padded to a multiple of this; padded ids are never predicted")
    tie_embeddings: bool = Field(True, description="the head uses the embedding's weights")
    norm_eps: float = Field(1e-5, gt=0, description="epsilon of every RMSNorm")
    embedding_scale: float = Field(1.0, gt=0, description="multiplies the embedding's output")
    residual_scale: float = Field(1.0, gt=0, description="multiplies what each mixer and FFN adds to the residual stream")
    logit_scale: float = Field(1.0, gt=0, description="multiplies the logits")
    logit_softcap: float | None = Field(None, gt=0, description="logits become cap * tanh(logits / cap); null: off")
