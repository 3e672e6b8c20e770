"""Gated DeltaNet (Yang et al. 2024), with the parameter names of flash-linear-attention and Olmo-Hybrid."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.layers.cache import LayerCache, StateCache
from hybridlm.layers.conv import depthwise, short_conv
from hybridlm.layers.init import Init, reset_step_bias
from hybridlm.layers.layer import PASSES, Phase, linear_flops
from hybridlm.layers.linear import Linear
from hybridlm.layers.mixer import Mixer, step_metrics
from hybridlm.layers.norm import RMSNorm
from hybridlm.layers.sequence import SequenceInfo
from hybridlm.ops.delta import gated_delta
from hybridlm.ops.kernels.rules import KernelUse, Need, conv_need
from hybridlm.ops.norm import as_dtype, at_least_fp32, gated_rms_norm, rms_norm

if TYPE_CHECKING:
    from hybridlm.config.mixers.gdn import DeltaSpec, GDNSpec


class DeltaMixer(Mixer):
    """``o_proj(gated(delta_rule(silu(conv([q, k, v])), log_decay, beta)))``; a subclass adds how decays and gate are
    made. The channels of conv1d are [q, k, v]."""

    def __init__(self, spec: DeltaSpec, n_decays: int) -> None:
        """n_decays: how many decays a token has, all value heads together."""
        super().__init__()
        self.spec = spec
        queries, keys, values = spec.qkv
        self.q_proj = Linear(spec.d_model, queries, bias=False)
        self.k_proj = Linear(spec.d_model, keys, bias=False)
        self.v_proj = Linear(spec.d_model, values, bias=False)
        self.b_proj = Linear(spec.d_model, spec.n_v_heads, bias=False)
        if spec.use_conv:
            self.conv1d = depthwise(sum(spec.qkv), spec.d_conv, bias=False)
        self.A_log = nn.Parameter(torch.empty(spec.n_v_heads))
        self.dt_bias = nn.Parameter(torch.empty(n_decays))
        self.o_norm = RMSNorm(spec.head_v_dim)
        self.o_proj = Linear(values, spec.d_model, bias=False)

    @abstractmethod
    def log_decay(self, x: Tensor) -> Tensor:
        """(B, T, H), or (B, T, H, Dk) with one for each channel of a key; at least fp32."""

    @abstractmethod
    def gated(self, o: Tensor, x: Tensor) -> Tensor:
        """Normalises o (B, T, H, Dv) over each head and gates it."""

    def forward(self, x: Tensor, seq: SequenceInfo, cache: LayerCache | None = None) -> Tensor:
        spec = self.spec
        assert cache is None or isinstance(cache, StateCache)
        qkv = torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), -1)
        qkv = short_conv(self.conv1d, qkv, seq, cache) if spec.use_conv else F.silu(qkv)
        q, k, v = qkv.split_with_sizes(spec.qkv, -1)
        log_decay, beta = self.log_decay(x), as_dtype(self.b_proj(x), at_least_fp32(x.dtype)).sigmoid()
        if spec.allow_neg_eigval:
            beta = 2 * beta
        if seq.valid is not None:  # padding takes no time and writes nothing
            beta = beta.masked_fill(~seq.valid.unsqueeze(-1), 0.0)
            log_decay = log_decay.masked_fill(~seq.valid.view(*seq.valid.shape, *(1,) * (log_decay.dim() - 2)), 0.0)
        o, state = gated_delta(
            q.unflatten(-1, (spec.n_k_heads, spec.head_k_dim)),
            k.unflatten(-1, (spec.n_k_heads, spec.head_k_dim)),
            v.unflatten(-1, (spec.n_v_heads, spec.head_v_dim)),
            log_decay,
            beta,
            initial_state=None if cache is None else cache["recurrent"],
            starts=seq.starts,
            chunk=spec.chunk,
            overwrite=True,
        )
        if cache is not None:
            cache.update({"recurrent": state})
        out: Tensor = self.o_proj(self.gated(o, x).flatten(2))
        return out

    def new_cache(self, batch: int, max_len: int, *, dtype: torch.dtype, device: torch.device) -> StateCache:
        spec = self.spec
        shape = (batch, spec.n_v_heads, spec.head_k_dim, spec.head_v_dim)
        states = {"recurrent": torch.zeros(shape, dtype=at_least_fp32(dtype), device=device)}
        if spec.use_conv:
            states["conv"] = torch.zeros(batch, spec.d_conv - 1, sum(spec.qkv), dtype=dtype, device=device)
        return StateCache(states)

    def flops(self, context: int, phase: Phase) -> float:
        spec = self.spec
        key, value = spec.head_k_dim, spec.head_v_dim
        head = 3 * 2 * key * value  # of a state: the value is predicted, the error written, the output read
        if phase != "decode":
            # Each token meets the whole tile of its chunk: two tiles of keys, two products with values, one inverse.
            chunk = min(spec.chunk, context)
            head += 4 * chunk * (key + value) + chunk**2
        projections = linear_flops(*(layer for layer in self.modules() if isinstance(layer, nn.Linear)))
        conv = 2 * spec.d_conv * sum(spec.qkv) if spec.use_conv else 0
        return PASSES[phase] * (projections + conv + spec.n_v_heads * head)

    def reset_parameters(self, init: Init) -> None:
        super().reset_parameters(init)
        reset_step_bias(self.dt_bias, self.spec.dt_range)
        with torch.no_grad():
            self.A_log.uniform_(*self.spec.a_range).log_()

    def metrics(self) -> dict[str, Tensor]:
        return step_metrics(self.dt_bias)

    @classmethod
    def kernel_needs(cls, spec: DeltaSpec, use: KernelUse) -> Iterable[Need]:
        if spec.use_conv:
            yield conv_need(sum(spec.qkv), spec.d_conv, use)


class GatedDeltaNet(DeltaMixer):
    """One decay for each value head, ``exp(-exp(A_log) softplus(a_proj(x) + dt_bias))``; gated by silu(g_proj(x))."""

    spec: GDNSpec

    def __init__(self, spec: GDNSpec) -> None:
        super().__init__(spec, spec.n_v_heads)
        self.a_proj = Linear(spec.d_model, spec.n_v_heads, bias=False)
        if spec.use_gate:
            self.g_proj = Linear(spec.d_model, spec.qkv[2], bias=False)

    def log_decay(self, x: Tensor) -> Tensor:
        wide = at_least_fp32(x.dtype)
        dt = F.softplus(as_dtype(self.a_proj(x), wide) + as_dtype(self.dt_bias, wide))
        return -self.A_log.to(wide).exp() * dt

    def gated(self, o: Tensor, x: Tensor) -> Tensor:
        spec = self.spec
        if not spec.use_gate:
            return rms_norm(o, self.o_norm.weight, spec.norm_eps)
        gate = self.g_proj(x).view(o.shape)
        return gated_rms_norm(o, gate, self.o_norm.weight, spec.norm_eps, groups=1, norm_before_gate=True)
