"""Kimi Delta Attention (Kimi Team 2025), with the parameter names of Kimi Linear's checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from hybridlm.layers.gdn import DeltaMixer
from hybridlm.layers.linear import Linear
from hybridlm.ops.norm import as_dtype, at_least_fp32, rms_norm

if TYPE_CHECKING:
    from hybridlm.config.mixers.kda import KDASpec


class KimiDeltaAttention(DeltaMixer):
    """A decay for each channel of each head's keys, ``exp(-exp(A_log) softplus(f_b_proj(f_a_proj(x)) + dt_bias))``; the
    gate is sigmoid(g_b_proj(g_a_proj(x))). Both pairs of projections have the rank of one head's values."""

    spec: KDASpec

    def __init__(self, spec: KDASpec) -> None:
        decays, rank = spec.n_v_heads * spec.head_k_dim, spec.head_v_dim
        super().__init__(spec, decays)
        self.f_a_proj = Linear(spec.d_model, rank, bias=False)
        self.f_b_proj = Linear(rank, decays, bias=False)
        self.g_a_proj = Linear(spec.d_model, rank, bias=False)
        self.g_b_proj = Linear(rank, spec.qkv[2], bias=spec.gate_bias)

    def log_decay(self, x: Tensor) -> Tensor:
        spec, wide = self.spec, at_least_fp32(x.dtype)
        rate = as_dtype(self.f_b_proj(self.f_a_proj(x)), wide) + as_dtype(self.dt_bias, wide)
        rate = rate.unflatten(-1, (spec.n_v_heads, spec.head_k_dim))
        speed = self.A_log.to(wide).exp().unsqueeze(-1)
        if spec.lower_bound is None:
            return -speed * F.softplus(rate)
        bounded: Tensor = spec.lower_bound * (speed * rate).sigmoid()
        return bounded

    def gated(self, o: Tensor, x: Tensor) -> Tensor:
        wide = at_least_fp32(o.dtype)
        gate: Tensor = as_dtype(self.g_b_proj(self.g_a_proj(x)), wide).sigmoid().view(o.shape)
        return as_dtype(rms_norm(as_dtype(o, wide), self.o_norm.weight, self.spec.norm_eps) * gate, o.dtype)

    def metrics(self) -> dict[str, Tensor]:
        return {} if self.spec.lower_bound is not None else super().metrics()
