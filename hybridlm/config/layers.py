"""Resolved layer descriptions: what one layer is, with every derived number filled in.

``config/resolve.py`` makes them from the model section. Layers, counter, planner, caches and export read only these,
so a layer never has to know how a default was derived.
Shape letters of the whole code base: B batch, T time, D d_model, H heads, P head_dim, N d_state, G groups, V vocabulary, K conv width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class AttentionSpec:
    """Grouped-query attention. ``scale`` is the softmax scale; ``window`` counts the token itself (None: all of the past)."""

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
class MLPSpec:
    """Dense feed-forward of width ``d_ff``: SwiGLU (three matrices) or squared ReLU (two), no biases."""

    d_model: int
    d_ff: int
    activation: Literal["swiglu", "relu2"]


MixerSpec = AttentionSpec | Mamba2Spec
FFNSpec = MLPSpec


@dataclass(frozen=True)
class LayerSpec:
    """One layer: a mixer of ``kind`` with its parameters, then an optional FFN of ``ffn_kind``."""

    kind: str
    params: MixerSpec
    ffn_kind: str  # "none" where there is no FFN
    ffn: FFNSpec | None
