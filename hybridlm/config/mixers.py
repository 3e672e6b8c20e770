"""The sections of the mixers: one per kind, ``model.attention``, ``model.mamba1``, ..."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hybridlm.config.section import Limits, Pair, Section

MIXER_KINDS = ("attention", "mamba1", "mamba2", "mamba3", "mla")
MixerKind = Literal["attention", "mamba1", "mamba2", "mamba3", "mla"]


class AttentionConfig(Section):
    """Grouped-query attention (``model.attention``)."""

    n_heads: int = Field(4, ge=1, description="query heads")
    n_kv_heads: int | None = Field(None, ge=1, description="key/value heads; null: as many as n_heads")
    head_dim: int | None = Field(None, ge=1, description="channels per head; null: d_model / n_heads")
    rope: bool = Field(False, description="rotary positions; false: no positional encoding (hybrids)")
    rope_theta: float = Field(10_000.0, gt=1, description="base of the rotary frequencies")
    qk_norm: bool = Field(False, description="RMSNorm over each query and key head before the rotation (Qwen3)")
    window: int | None = Field(
        None, ge=1, description="sliding window in tokens, the token itself included; null: all of the past"
    )
    scale: float | None = Field(None, gt=0, description="softmax scale; null: head_dim ** -0.5")


class Mamba1Config(Section):
    """Mamba-1, the selective scan (``model.mamba1``); names are those of mamba_ssm."""

    d_state: int = Field(16, ge=1, description="state channels N per inner channel")
    d_conv: int = Field(4, ge=1, le=16, description="width K of the short causal convolution")
    expand: float = Field(2, gt=0, description="d_inner / d_model")
    dt_rank: int | None = Field(
        None, ge=1, description="rank of the step size's projection; null: d_model / 16, rounded up"
    )
    bias: bool = Field(False, description="biases of in_proj and out_proj")
    chunk: int = Field(16, ge=1, le=1024, description="chunk length of the scan; changes speed, not results")
    dt_range: Pair = Field((1e-3, 1e-1), description="initial step sizes, log-uniform between the two")


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
    norm_before_gate: bool = Field(
        False, description="false: gate, then norm (Mamba-2); true: norm, then gate (FalconH1)"
    )


class Mamba3Config(Section):
    """Mamba-3, SISO or MIMO (``model.mamba3``); names are those of mamba_ssm."""

    d_state: int = Field(64, ge=1, description="state channels N per head")
    expand: float = Field(2, gt=0, description="d_inner / d_model")
    head_dim: int = Field(64, ge=1, description="channels P per head")
    n_heads: int | None = Field(None, ge=1, description="heads H; null: expand * d_model / head_dim")
    n_groups: int = Field(1, ge=1, description="groups G that share B and C before the biases of the heads")
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
    d_conv: int = Field(4, ge=1, le=16, description="its width K")
    a_activation: Literal["softplus", "heavy_tail"] = Field(
        "softplus", description="what makes -A positive: softplus (as released)"
    )
    a_floor: float = Field(1e-4, gt=0, description="smallest -A")
    outproj_norm: bool = Field(False, description="RMSNorm over each head and rank before the gate")
    dt_range: Pair = Field((1e-3, 1e-1), description="initial step sizes, log-uniform between the two")


class MLAConfig(Section):
    """Multi-head latent attention (``model.mla``); names are those of DeepSeek-V3."""

    n_heads: int = Field(4, ge=1, description="heads H")
    kv_lora_rank: int | None = Field(
        None, ge=1, description="channels of the latent that is cached; null: d_model / 2, rounded up"
    )
    q_lora_rank: int | None = Field(None, ge=1, description="rank of the queries' projection; null: full rank")
    qk_nope_head_dim: int = Field(48, ge=1, description="channels per head of queries and keys that carry no position")
    qk_rope_head_dim: int = Field(
        16, ge=0, description="channels of the one key that all heads share, rotated where rope is on; 0: none"
    )
    v_head_dim: int = Field(64, ge=1, description="channels per head of values")
    rope: bool = Field(
        True, description="rotary positions on the qk_rope channels; false: no positional encoding (hybrids)"
    )
    rope_theta: float = Field(10_000.0, gt=1, description="base of the rotary frequencies")
    rope_interleave: bool = Field(
        True, description="pairs are neighbours (2i, 2i+1), as DeepSeek has them; false: half-split"
    )
    scale: float | None = Field(
        None, gt=0, description="softmax scale; null: (qk_nope_head_dim + qk_rope_head_dim) ** -0.5"
    )
