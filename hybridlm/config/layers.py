"""Resolved layer descriptions: what one layer is, with every derived number filled in.

``config/resolve.py`` makes them from the model section. Layers, counter, planner, caches and export read only these, so
a layer never has to know how a default was derived. Shape letters of the whole code base: B batch, T time, D d_model, H
heads, P head_dim, N d_state, G groups, V vocabulary, K conv width, E experts, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class AttentionSpec:
    """Grouped-query attention. ``scale`` is the softmax scale; ``window`` counts the token itself (None: all of the
    past)."""

    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rope: bool
    rope_theta: float
    qk_norm: bool
    window: int | None
    scale: float
    norm_eps: float


@dataclass(frozen=True)
class Mamba1Spec:
    """Mamba-1 (selective scan): every one of ``d_inner`` channels has ``d_state`` states of its own."""

    d_model: int
    d_inner: int
    d_state: int
    d_conv: int
    dt_rank: int
    bias: bool
    chunk: int
    dt_range: tuple[float, float]


@dataclass(frozen=True)
class Mamba2Spec:
    """Mamba-2 (SSD). ``n_heads * head_dim`` is d_inner; B and C have ``n_groups`` groups of ``d_state`` channels."""

    d_model: int
    n_heads: int
    head_dim: int
    d_state: int
    n_groups: int
    d_conv: int
    chunk: int
    dt_range: tuple[float, float]
    dt_limit: tuple[float, float]
    a_range: tuple[float, float]
    norm_before_gate: bool
    norm_eps: float

    @property
    def d_inner(self) -> int:
        return self.n_heads * self.head_dim

    @property
    def conv_channels(self) -> int:
        return self.d_inner + 2 * self.n_groups * self.d_state  # [x, B, C]


@dataclass(frozen=True)
class Mamba3Spec:
    """Mamba-3. ``mimo_rank`` None is SISO; B and C have ``rank`` x ``n_groups`` x ``d_state`` channels, rank
    slowest."""

    d_model: int
    n_heads: int
    head_dim: int
    d_state: int
    n_groups: int
    mimo_rank: int | None
    chunk: int
    complex_rope: bool
    rope_fraction: float
    trapezoidal: bool
    use_conv: bool
    d_conv: int
    a_activation: Literal["softplus", "heavy_tail"]
    a_floor: float
    outproj_norm: bool
    dt_range: tuple[float, float]
    norm_eps: float

    @property
    def d_inner(self) -> int:
        return self.n_heads * self.head_dim

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


@dataclass(frozen=True)
class MLASpec:
    """Multi-head latent attention. A token's cache is its latent (``kv_lora_rank``) and one shared key
    (``qk_rope_head_dim``)."""

    d_model: int
    n_heads: int
    kv_lora_rank: int
    q_lora_rank: int | None
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope: bool
    rope_theta: float
    rope_interleave: bool
    scale: float


@dataclass(frozen=True)
class MLPSpec:
    """Dense feed-forward of width ``d_ff``: SwiGLU (three matrices) or squared ReLU (two), no biases."""

    d_model: int
    d_ff: int
    activation: Literal["swiglu", "relu2"]


@dataclass(frozen=True)
class MoESpec:
    """Mixture of ``n_experts`` experts of width ``d_expert``; ``d_shared`` is the joint width of the shared ones (0:
    none)."""

    d_model: int
    n_experts: int
    top_k: int
    d_expert: int
    d_shared: int
    activation: Literal["swiglu", "relu2"]
    router: Literal["softmax", "sigmoid"]
    norm_topk_prob: bool
    routed_scaling_factor: float
    n_expert_groups: int
    topk_groups: int
    balance_loss_weight: float
    z_loss_weight: float
    bias_update_rate: float

    @property
    def shared(self) -> MLPSpec | None:
        """The dense FFN that the shared experts are together."""
        return MLPSpec(self.d_model, self.d_shared, self.activation) if self.d_shared else None


MixerSpec = AttentionSpec | Mamba1Spec | Mamba2Spec | Mamba3Spec | MLASpec
FFNSpec = MLPSpec | MoESpec


@dataclass(frozen=True)
class LayerSpec:
    """One layer: a mixer of ``kind`` with its parameters, then an optional FFN of ``ffn_kind``."""

    kind: str
    params: MixerSpec
    ffn_kind: str  # "none" where there is no FFN
    ffn: FFNSpec | None
