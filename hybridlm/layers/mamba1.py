"""Mamba-1 (Gu & Dao 2023), with the parameter names of mamba_ssm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.layers.cache import LayerCache, StateCache
from hybridlm.layers.conv import depthwise, short_conv
from hybridlm.layers.init import VECTOR_FP32, Init, ParamSpec, fused, reset_convolution, reset_step_bias
from hybridlm.layers.layer import PASSES, Phase, linear_flops
from hybridlm.layers.linear import Linear
from hybridlm.layers.mixer import Mixer, step_metrics
from hybridlm.layers.sequence import SequenceInfo
from hybridlm.ops.dispatch import autocast_off
from hybridlm.ops.kernels.rules import KernelUse, Need, conv_need, mamba1_refusal
from hybridlm.ops.linear import linear
from hybridlm.ops.norm import at_least_fp32
from hybridlm.ops.selective_scan import selective_scan

if TYPE_CHECKING:
    from hybridlm.config.mixers.mamba1 import Mamba1Spec


class Mamba1(Mixer):
    """``out_proj(selective_scan(c, dt, A, B, C) * silu(z))`` with ``c = silu(conv(x))``.

    The rows of in_proj are [x, z], those of x_proj [dt, B, C]: the step size has ``dt_rank`` rows there, and dt_proj
    makes of them one step size per channel.
    """

    def __init__(self, spec: Mamba1Spec) -> None:
        super().__init__()
        self.spec = spec
        self.in_proj = Linear(spec.d_model, 2 * spec.d_inner, bias=spec.bias)
        self.conv1d = depthwise(spec.d_inner, spec.d_conv)
        self.x_proj = Linear(spec.d_inner, spec.dt_rank + 2 * spec.d_state, bias=False)
        self.dt_proj = Linear(spec.dt_rank, spec.d_inner)
        self.A_log = nn.Parameter(torch.empty(spec.d_inner, spec.d_state))
        self.D = nn.Parameter(torch.empty(spec.d_inner))
        self.out_proj = Linear(spec.d_inner, spec.d_model, bias=spec.bias)

    def forward(self, x: Tensor, seq: SequenceInfo, cache: LayerCache | None = None) -> Tensor:
        spec = self.spec
        assert cache is None or isinstance(cache, StateCache)
        inner, z = self.in_proj.split(x, (spec.d_inner, spec.d_inner))
        inner = short_conv(self.conv1d, inner, seq, cache)
        delta, B, C = self.x_proj(inner).split((spec.dt_rank, spec.d_state, spec.d_state), dim=-1)
        y, ssm_state = selective_scan(
            inner,
            self._step_sizes(delta, seq.valid),
            -self.A_log.to(at_least_fp32(x.dtype)).exp(),
            B,
            C,
            self.D,
            initial_state=None if cache is None else cache["ssm"],
            starts=seq.starts,
            chunk=spec.chunk,
            backend=seq.kernels.mamba1,
        )
        if cache is not None:
            cache.update({"ssm": ssm_state})
        out: Tensor = self.out_proj(y * F.silu(z))
        return out

    def _step_sizes(self, delta: Tensor, valid: Tensor | None) -> Tensor:
        """dt (B, T, E) in at least fp32, also under autocast: it is exponentiated. 0 at padding, which changes no
        state."""
        wide = at_least_fp32(delta.dtype)
        with autocast_off(delta):
            dt = F.softplus(linear(delta.to(wide), self.dt_proj.weight.to(wide), self.dt_proj.bias.to(wide)))
        return dt if valid is None else dt.masked_fill(valid.logical_not().unsqueeze(-1), 0.0)

    def new_cache(self, batch: int, max_len: int, *, dtype: torch.dtype, device: torch.device) -> StateCache:
        spec = self.spec
        conv = torch.zeros(batch, spec.d_conv - 1, spec.d_inner, dtype=dtype, device=device)
        ssm = torch.zeros(batch, spec.d_inner, spec.d_state, dtype=at_least_fp32(dtype), device=device)
        return StateCache({"conv": conv, "ssm": ssm})

    def flops(self, context: int, phase: Phase) -> float:
        spec = self.spec
        projections = linear_flops(self.in_proj, self.x_proj, self.dt_proj, self.out_proj)
        # Two multiply-adds for each number of the state: it is written, and read. Its decay is left out, as in the
        # other mixers.
        state = 2 * 2 * spec.d_inner * spec.d_state
        return PASSES[phase] * (projections + 2 * spec.d_conv * spec.d_inner + state)

    def reset_parameters(self, init: Init) -> None:
        init.matrix(self.in_proj.weight)  # not the default: dt_proj is not drawn like the others
        init.matrix(self.x_proj.weight)
        init.residual_matrix(self.out_proj.weight)
        for projection in (self.in_proj, self.out_proj):
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        reset_convolution(self.conv1d)
        rank_bound = self.spec.dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -rank_bound, rank_bound)
        reset_step_bias(self.dt_proj.bias, self.spec.dt_range)
        with torch.no_grad():
            rates = torch.arange(1, self.spec.d_state + 1, dtype=torch.float64, device=self.A_log.device)
            self.A_log.copy_(rates.log().expand_as(self.A_log))
        nn.init.ones_(self.D)

    def param_specs(self) -> dict[str, ParamSpec]:
        spec = self.spec
        return super().param_specs() | {
            "in_proj.weight": fused(spec.d_inner, spec.d_inner),
            "x_proj.weight": fused(spec.dt_rank, spec.d_state, spec.d_state),
            "dt_proj.bias": VECTOR_FP32,
        }

    def metrics(self) -> dict[str, Tensor]:
        return step_metrics(self.dt_proj.bias)

    @classmethod
    def kernel_needs(cls, spec: Mamba1Spec, use: KernelUse) -> Iterable[Need]:
        yield conv_need(spec.d_inner, spec.d_conv, use)
        refusal = mamba1_refusal(spec.d_state, use.dtype, documents=use.documents)
        yield Need("mamba1", "mamba1", "selective scan", refusal)
