"""Grouped-query attention with optional rotary positions, QK-norm, sliding window and gate (Ainslie et al. 2023)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm.layers.cache import LayerCache, TokenCache
from hybridlm.layers.layer import PASSES, Phase, linear_flops
from hybridlm.layers.linear import Linear
from hybridlm.layers.mixer import Mixer, MixerStep
from hybridlm.layers.norm import RMSNorm
from hybridlm.layers.sequence import SequenceInfo
from hybridlm.ops.attention import attention
from hybridlm.ops.linear import linear_of_one
from hybridlm.ops.norm import rms_norm, rms_norm_of_one
from hybridlm.ops.rotary import apply_rotary

if TYPE_CHECKING:
    from hybridlm.config.mixers.attention import AttentionSpec


class Attention(Mixer):
    """Causal softmax attention; H query heads share H_kv key/value heads. QK-norm comes before the rotation (Qwen3)."""

    shares_tables = True

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        self.spec = spec
        self.q_proj = Linear(spec.d_model, spec.n_heads * spec.head_dim, bias=False)
        self.k_proj = Linear(spec.d_model, spec.n_kv_heads * spec.head_dim, bias=False)
        self.v_proj = Linear(spec.d_model, spec.n_kv_heads * spec.head_dim, bias=False)
        self.o_proj = Linear(spec.n_heads * spec.head_dim, spec.d_model, bias=False)
        self.g_proj = Linear(spec.d_model, spec.n_heads * spec.head_dim, bias=False) if spec.gate else None
        self.q_norm = RMSNorm(spec.head_dim) if spec.qk_norm else None
        self.k_norm = RMSNorm(spec.head_dim) if spec.qk_norm else None

    def forward(self, x: Tensor, seq: SequenceInfo, cache: LayerCache | None = None) -> Tensor:
        spec = self.spec
        q = self.q_proj(x).unflatten(-1, (spec.n_heads, spec.head_dim))  # (B, T, H, P)
        k = self.k_proj(x).unflatten(-1, (spec.n_kv_heads, spec.head_dim))
        v = self.v_proj(x).unflatten(-1, (spec.n_kv_heads, spec.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = rms_norm(q, self.q_norm.weight, spec.norm_eps), rms_norm(k, self.k_norm.weight, spec.norm_eps)
        if spec.rope:
            cos, sin = seq.rotary(spec.rope_dim, spec.rope_theta, x.dtype)
            q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        bounded: int | None = 0  # without a cache the last column is the newest token, as in a bounded one
        if cache is not None:
            assert isinstance(cache, TokenCache)
            seen = cache.append({"k": k, "v": v}, seq)
            k, v, bounded = seen["k"], seen["v"], cache.bounded
        mask = None if seq.plain else seq.visible(spec.window, bounded)
        y = attention(q, k, v, scale=spec.scale, window=spec.window, mask=mask).flatten(2)
        if self.g_proj is not None:
            y = y * self.g_proj(x).sigmoid()
        out: Tensor = self.o_proj(y)
        return out

    def prepare(self) -> MixerStep:
        spec = self.spec
        q_proj, k_proj, v_proj, o_proj = (
            linear_of_one(layer.weight) for layer in (self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        )
        g_proj = None if self.g_proj is None else linear_of_one(self.g_proj.weight)
        norm: Tensor | None = None  # (H + H_kv, P): queries and keys are one tensor here
        if self.q_norm is not None and self.k_norm is not None:
            norms = self.q_norm.weight.expand(spec.n_heads, -1), self.k_norm.weight.expand(spec.n_kv_heads, -1)
            norm = torch.cat(norms)
        whole = super().prepare()

        def step(x: Tensor, cache: LayerCache, seq: SequenceInfo) -> Tensor:
            assert isinstance(cache, TokenCache)
            if cache.bounded is not None or not seq.plain:
                return whole(x, cache, seq)
            rows = len(x)
            qk = torch.cat((q_proj(x), k_proj(x)), 1).view(rows, -1, spec.head_dim)
            if norm is not None:
                qk = rms_norm_of_one(qk, norm, spec.norm_eps)
            if spec.rope:
                cos, sin = seq.rotary_of_one(spec.rope_dim, spec.rope_theta, x.dtype)
                rest, qk = qk[..., spec.rope_dim :], qk[..., : spec.rope_dim]
                qk = (qk * cos).addcmul_(qk.roll(spec.rope_dim // 2, -1), sin)
                qk = torch.cat((qk, rest), -1) if spec.rope_dim < spec.head_dim else qk
            q, k = qk.split_with_sizes((spec.n_heads, spec.n_kv_heads), 1)
            v = v_proj(x).view(rows, spec.n_kv_heads, spec.head_dim)
            seen = cache.append_one({"k": k, "v": v}, seq.past)
            q = q.reshape(rows, spec.n_kv_heads, -1, spec.head_dim)  # heads of a group are queries of one key head
            y = F.scaled_dot_product_attention(q, seen["k"], seen["v"], scale=spec.scale)
            y = y.reshape(rows, -1)
            return o_proj(y if g_proj is None else y * g_proj(x).sigmoid_())

        return step

    def new_cache(self, batch: int, max_len: int, *, dtype: torch.dtype, device: torch.device) -> TokenCache:
        one = (self.spec.n_kv_heads, self.spec.head_dim)  # keys are kept after the rotation
        return TokenCache({"k": one, "v": one}, batch, max_len, self.spec.window, dtype=dtype, device=device)

    def flops(self, context: int, phase: Phase) -> float:
        spec = self.spec
        longest = context + 1 if phase == "decode" else context  # a decoded token sees the context and itself
        reach = longest if spec.window is None else min(longest, spec.window)
        # Keys seen per token: the mean of 1, 2, ... up to the reach, which is kept from there on; in decode the reach
        # itself.
        keys = reach if phase == "decode" else (reach * (reach + 1) / 2 + (context - reach) * reach) / context
        scores_and_values = 2 * 2 * spec.n_heads * spec.head_dim * keys
        projections = [layer for layer in self.children() if isinstance(layer, Linear)]
        return PASSES[phase] * (linear_flops(*projections) + scores_and_values)
