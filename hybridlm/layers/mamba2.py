"""Mamba-2 (Dao & Gu 2024), with the parameter names of mamba_ssm."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.layers.cache import LayerCache, StateCache
from hybridlm.layers.conv import depthwise, short_conv
from hybridlm.layers.init import Init, ParamSpec, fused, reset_step_bias
from hybridlm.layers.layer import PASSES, Phase, linear_flops
from hybridlm.layers.linear import Linear
from hybridlm.layers.mixer import Mixer, MixerStep, step_metrics
from hybridlm.layers.norm import RMSNorm
from hybridlm.layers.sequence import SequenceInfo
from hybridlm.ops.dispatch import product_dtype
from hybridlm.ops.kernels.choice import CUDA
from hybridlm.ops.kernels.rules import KernelUse, Need, Sizes, conv_need, mamba2_layer_refusal, mamba2_refusal
from hybridlm.ops.linear import linear_of_one
from hybridlm.ops.norm import as_dtype, at_least_fp32, gated_rms_norm, rms_norm_of_one
from hybridlm.ops.ssd import ssd

if TYPE_CHECKING:
    from hybridlm.config.mixers.mamba2 import Mamba2Spec

_CACHED = 1 << 19  # bytes of a state that stay in a core's cache


class Mamba2(Mixer):
    """``out_proj(norm(ssd(silu(conv(x)), dt, A, B, C) * silu(z)))``; the rows of in_proj are [z, x, B, C, dt]."""

    def __init__(self, spec: Mamba2Spec) -> None:
        super().__init__()
        self.spec = spec
        self.row_blocks = (
            spec.d_inner,
            spec.d_inner,
            spec.n_groups * spec.d_state,
            spec.n_groups * spec.d_state,
            spec.n_heads,
        )
        self.in_proj = Linear(spec.d_model, sum(self.row_blocks), bias=False)
        self.conv1d = depthwise(spec.conv_channels, spec.d_conv)
        self.dt_bias = nn.Parameter(torch.empty(spec.n_heads))
        self.A_log = nn.Parameter(torch.empty(spec.n_heads))
        self.D = nn.Parameter(torch.empty(spec.n_heads))
        self.norm = RMSNorm(spec.d_inner)
        self.out_proj = Linear(spec.d_inner, spec.d_model, bias=False)

    def forward(self, x: Tensor, seq: SequenceInfo, cache: LayerCache | None = None) -> Tensor:
        spec = self.spec
        assert cache is None or isinstance(cache, StateCache)
        whole = seq.kernels.mamba2_layer == CUDA and cache is None and seq.valid is None
        if whole and mamba2_layer_refusal(spec.conv_channels, spec.d_conv, spec.d_state, product_dtype(x)) is None:
            return self._in_one_kernel(self.in_proj(x), seq)
        z, xBC, dt = self.in_proj.split(x, (spec.d_inner, spec.conv_channels, spec.n_heads))
        xBC = short_conv(self.conv1d, xBC, seq, cache)
        inner, B, C = xBC.split_with_sizes(self.row_blocks[1:4], dim=-1)

        wide = at_least_fp32(x.dtype)
        dt = F.softplus(as_dtype(dt, wide) + as_dtype(self.dt_bias, wide))  # (B, T, H)
        if spec.dt_limit != (0.0, math.inf):
            dt = dt.clamp(*spec.dt_limit)
        if seq.valid is not None:  # padding takes no time and writes nothing
            dt = dt.masked_fill(~seq.valid.unsqueeze(-1), 0.0)
        y, ssm_state = ssd(
            inner.unflatten(-1, (spec.n_heads, spec.head_dim)),
            dt,
            -self.A_log.to(wide).exp(),
            B.unflatten(-1, (spec.n_groups, spec.d_state)),
            C.unflatten(-1, (spec.n_groups, spec.d_state)),
            self.D,
            initial_state=None if cache is None else cache["ssm"],
            starts=seq.starts,
            chunk=spec.chunk,
            overwrite=True,
            backend=seq.kernels.mamba2,
        )
        if cache is not None:
            cache.update({"ssm": ssm_state})
        y = gated_rms_norm(
            y.flatten(2),
            z,
            self.norm.weight,
            spec.norm_eps,
            groups=spec.n_groups,
            norm_before_gate=spec.norm_before_gate,
        )
        out: Tensor = self.out_proj(y)
        return out

    def _in_one_kernel(self, zxbcdt: Tensor, seq: SequenceInfo) -> Tensor:
        """Everything after ``in_proj``, where no state is needed and nothing is padding."""
        from hybridlm.ops.kernels.calls import LayerWeights, kernel_mamba2_layer

        spec, conv = self.spec, self.conv1d
        assert conv.bias is not None
        return kernel_mamba2_layer(
            zxbcdt,
            LayerWeights(
                conv.weight, conv.bias, self.dt_bias, self.A_log, self.D, self.norm.weight, self.out_proj.weight
            ),
            seq.starts,
            head_dim=spec.head_dim,
            n_groups=spec.n_groups,
            dt_limit=spec.dt_limit,
            norm_eps=spec.norm_eps,
            norm_before_gate=spec.norm_before_gate,
        )

    def prepare(self) -> MixerStep:
        spec, groups = self.spec, self.spec.n_groups
        in_proj, out_proj = linear_of_one(self.in_proj.weight), linear_of_one(self.out_proj.weight)
        taps, bias, D = self.conv1d.weight[:, 0].t().contiguous(), self.conv1d.bias, self.D.unsqueeze(-1)
        A, limit = -self.A_log.exp(), None if spec.dt_limit == (0.0, math.inf) else spec.dt_limit
        norm = self.norm.weight.view(groups, -1)
        parts, channels = (spec.d_inner, spec.conv_channels, spec.n_heads), self.row_blocks[1:4]
        assert bias is not None

        def gated(y: Tensor, z: Tensor) -> Tensor:
            if not spec.norm_before_gate:
                y = F.silu(z).mul_(y)
            out = rms_norm_of_one(y.view(len(y), groups, -1), norm, spec.norm_eps).view(y.shape)
            return out.mul_(F.silu(z)) if spec.norm_before_gate else out

        def step(x: Tensor, cache: LayerCache, seq: SequenceInfo) -> Tensor:
            assert isinstance(cache, StateCache)
            z, xBC, dt = in_proj(x).split_with_sizes(parts, -1)
            kept, state, rows = cache["conv"], cache["ssm"], len(x)
            window = torch.cat((kept, xBC.unsqueeze(1)), 1)  # (B, K, C)
            kept.copy_(window[:, 1:])
            xBC = F.silu((window * taps).sum(1).add_(bias), inplace=True)
            inner, B, C = xBC.split_with_sizes(channels, -1)
            dt = F.softplus(dt + self.dt_bias)  # (B, H)
            if limit is not None:
                dt = dt.clamp(*limit)
            inner = inner.view(rows, spec.n_heads, spec.head_dim)
            decay = (dt * A).exp_().view(rows, -1, 1, 1)
            written = (inner * dt.unsqueeze(-1)).view(rows, groups, -1, 1)
            B, C = B.view(rows, groups, 1, -1), C.reshape(rows * groups, -1, 1)
            ys = []
            # A state is gone through three times: so many rows at a time that it is in the processor's cache.
            some = max(1, _CACHED // state[0].nbytes) if x.is_cpu else rows
            for at in range(0, rows, some):
                part = state[at : at + some].mul_(decay[at : at + some])
                part = part.view(len(part), groups, -1, spec.d_state)  # the heads of a group share its B and C
                part.addcmul_(written[at : at + some], B[at : at + some])
                ys.append(torch.bmm(part.flatten(0, 1), C[at * groups : (at + some) * groups]))
            y = (ys[0] if len(ys) == 1 else torch.cat(ys)).view(inner.shape).addcmul_(D, inner)
            return out_proj(gated(y.view(rows, -1), z))

        return step

    def new_cache(self, batch: int, max_len: int, *, dtype: torch.dtype, device: torch.device) -> StateCache:
        spec = self.spec
        conv = torch.zeros(batch, spec.d_conv - 1, spec.conv_channels, dtype=dtype, device=device)
        ssm = torch.zeros(batch, spec.n_heads, spec.head_dim, spec.d_state, dtype=at_least_fp32(dtype), device=device)
        return StateCache({"conv": conv, "ssm": ssm})

    def flops(self, context: int, phase: Phase) -> float:
        spec = self.spec
        state = 2 * 2 * spec.d_inner * spec.d_state  # written and read
        if phase != "decode":
            chunk = min(spec.chunk, context)  # each token meets the whole tile of its chunk, masked or not
            state += 2 * chunk * (spec.n_groups * spec.d_state + spec.d_inner)
        return PASSES[phase] * (
            linear_flops(self.in_proj, self.out_proj) + 2 * spec.d_conv * spec.conv_channels + state
        )

    def reset_parameters(self, init: Init) -> None:
        super().reset_parameters(init)
        reset_step_bias(self.dt_bias, self.spec.dt_range)
        with torch.no_grad():
            self.A_log.uniform_(*self.spec.a_range).log_()
        nn.init.ones_(self.D)

    def param_specs(self) -> dict[str, ParamSpec]:
        return super().param_specs() | {"in_proj.weight": fused(*self.row_blocks)}

    def metrics(self) -> dict[str, Tensor]:
        return step_metrics(self.dt_bias)

    @classmethod
    def kernel_needs(cls, spec: Mamba2Spec, use: KernelUse) -> Iterable[Need]:
        yield conv_need(spec.conv_channels, spec.d_conv, use)
        sizes = Sizes(head_dim=spec.head_dim, d_state=spec.d_state, width=spec.d_conv)
        reason, whole = mamba2_refusal(spec.d_state, use.dtype), ("mamba2_layer", "Mamba-2 layer")
        yield Need("mamba2", "mamba2", "SSD scan", reason, (sizes,), whole)
