"""Mamba-3 (Lahoti et al. 2026), SISO and MIMO, with the parameter names of mamba_ssm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.layers.cache import LayerCache, StateCache
from hybridlm.layers.conv import depthwise, short_conv
from hybridlm.layers.init import Init, ParamSpec, fused, reset_step_bias
from hybridlm.layers.layer import PASSES, Phase, linear_flops
from hybridlm.layers.linear import Linear
from hybridlm.layers.mixer import Mixer, step_metrics
from hybridlm.layers.norm import RMSNorm
from hybridlm.layers.sequence import SequenceInfo
from hybridlm.ops.kernels.choice import CUDA
from hybridlm.ops.kernels.rules import KernelUse, Need, Sizes, conv_need, mamba3_refusal, mimo_refusal
from hybridlm.ops.mimo import mimo_scan
from hybridlm.ops.mimo_gate import mimo_gate, mimo_gate_step
from hybridlm.ops.norm import as_dtype, at_least_fp32, rms_norm
from hybridlm.ops.trapezoid import angles, carried_state, previous_weight, trapezoid_step, turned, write_weight

if TYPE_CHECKING:
    from hybridlm.config.mixers.mamba3 import Mamba3Spec


class _Steps(NamedTuple):
    """What the recurrence reads of T tokens, in at least fp32 and nothing at padding."""

    x: Tensor  # (B, T, H, P)
    B: Tensor  # (B, T, R, G, N), normalised
    C: Tensor
    log_decay: Tensor  # (B, T, H)  A dt
    own: Tensor  # (B, T, H)  lambda dt
    previous: Tensor | None  # (B, T, H)  (1 - lambda) dt; None: not trapezoidal
    theta: Tensor | None  # (B, H, n, T); None: nothing rotates


class Mamba3(Mixer):
    """``out_proj(sum_r mimo_o_r * y_r * silu(mimo_z_r * z))`` with y the trapezoidal scan over B and C, normalised,
    biased and rotated by data-dependent angles. The rows of in_proj are [z, x, B, C, dt, A, trap, angle]; SISO has one
    rank and none of the mimo_*."""

    def __init__(self, spec: Mamba3Spec) -> None:
        super().__init__()
        self.spec = spec
        self.adjacent = spec.mimo_rank is None
        state_channels = spec.rank * spec.n_groups * spec.d_state
        trap = (spec.n_heads,) if spec.trapezoidal else ()
        angle = (spec.n_angles,) if spec.complex_rope else ()
        inner = (spec.d_inner, spec.d_inner, state_channels, state_channels)
        self.row_blocks = (*inner, spec.n_heads, spec.n_heads, *trap, *angle)
        self.in_proj = Linear(spec.d_model, sum(self.row_blocks), bias=False)
        if spec.use_conv:
            self.conv1d = depthwise(spec.conv_channels, spec.d_conv)
        self.dt_bias = nn.Parameter(torch.empty(spec.n_heads))
        self.B_bias = nn.Parameter(torch.empty(spec.n_heads, spec.rank, spec.d_state))
        self.C_bias = nn.Parameter(torch.empty(spec.n_heads, spec.rank, spec.d_state))
        self.B_norm, self.C_norm = RMSNorm(spec.d_state), RMSNorm(spec.d_state)
        self.D = nn.Parameter(torch.empty(spec.n_heads))
        if spec.mimo_rank is not None:
            ranks = (spec.n_heads, spec.mimo_rank, spec.head_dim)
            self.mimo_x, self.mimo_z, self.mimo_o = (nn.Parameter(torch.empty(ranks)) for _ in range(3))
        if spec.outproj_norm:
            self.norm = RMSNorm(spec.d_inner)
        self.out_proj = Linear(spec.d_inner, spec.d_model, bias=False)

    def forward(self, x: Tensor, seq: SequenceInfo, cache: LayerCache | None = None) -> Tensor:
        assert cache is None or isinstance(cache, StateCache)
        spec = self.spec
        z, xBC, rates = self.in_proj.split(x, (spec.d_inner, sum(self.row_blocks[1:4]), sum(self.row_blocks[4:])))
        if spec.use_conv:
            xBC = short_conv(self.conv1d, xBC, seq, cache)
        if self._kernel_takes(xBC, seq, cache):
            mixed = self._in_one_kernel(xBC, rates, z, seq)
        else:
            mixed = self._mixed(self._steps(xBC, rates, seq, cache), z, seq, cache)
        out: Tensor = self.out_proj(as_dtype(mixed.flatten(2), z.dtype))
        return out

    def _mixed(self, steps: _Steps, z: Tensor, seq: SequenceInfo, cache: StateCache | None) -> Tensor:
        """The gated output (B, T, H, P)."""
        z = z.unflatten(-1, (self.spec.n_heads, self.spec.head_dim))
        if cache is not None and z.shape[1] == 1:
            return self._gated_step(self._stepped(steps, seq, cache), z[:, 0]).unsqueeze(1)
        return self._gated(self._scanned(steps, seq, cache), z)

    def _steps(self, xBC: Tensor, rates: Tensor, seq: SequenceInfo, cache: StateCache | None) -> _Steps:
        spec = self.spec
        x, B, C, dt, decay, others = self._rates(xBC, rates)
        if seq.valid is not None:  # padding takes no time and writes nothing
            x, dt = x.masked_fill(~seq.valid[..., None, None], 0.0), dt.masked_fill(~seq.valid.unsqueeze(-1), 0.0)
        own, previous, theta = dt, None, None
        if spec.trapezoidal:
            mix = others[0].sigmoid()
            own, previous = mix * dt, previous_weight(dt, mix, seq.starts)
        if spec.complex_rope:
            theta = angles(others[-1], dt, None if cache is None else cache["angle"], seq.starts)
        return _Steps(x, B, C, -decay * dt, own, previous, theta)

    def _rates(self, xBC: Tensor, rates: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
        """x (B, T, H, P), B and C (B, T, R, G, N), normalised, dt and -A (B, T, H), and what in_proj gave of trap and
        angle."""
        spec, wide = self.spec, at_least_fp32(xBC.dtype)
        x, B, C = xBC.split(self.row_blocks[1:4], dim=-1)
        ranks = (spec.rank, spec.n_groups, spec.d_state)
        B = rms_norm(as_dtype(B.unflatten(-1, ranks), wide), self.B_norm.weight, spec.norm_eps)
        C = rms_norm(as_dtype(C.unflatten(-1, ranks), wide), self.C_norm.weight, spec.norm_eps)
        dt_rate, decay_rate, *others = as_dtype(rates, wide).split(self.row_blocks[4:], dim=-1)
        dt = F.softplus(dt_rate + as_dtype(self.dt_bias, wide))
        if spec.a_activation == "softplus":
            decay = F.softplus(decay_rate)
        else:
            decay = torch.where(decay_rate >= 0, 1 + decay_rate, 1 / (1 - decay_rate.clamp_max(0)))
        return x.unflatten(-1, (spec.n_heads, spec.head_dim)), B, C, dt, decay.clamp_min(spec.a_floor), others

    def _kernel_takes(self, xBC: Tensor, seq: SequenceInfo, cache: StateCache | None) -> bool:
        chosen = seq.kernels.mamba3_siso if self.spec.mimo_rank is None else seq.kernels.mamba3_mimo
        if chosen != CUDA or cache is not None:
            return False
        length = xBC.shape[1] if seq.starts is None else None  # documents end anywhere
        return _refusal(self.spec, xBC.dtype, padding=seq.valid is not None, length=length) is None

    def _in_one_kernel(self, xBC: Tensor, rates: Tensor, z: Tensor, seq: SequenceInfo) -> Tensor:
        """The gated output (B, T, H, P) where no state is needed and nothing is padding."""
        from hybridlm.ops.kernels.mamba3 import Mamba3Inputs, kernel_mimo, kernel_siso

        spec = self.spec
        x, B, C, dt, decay, (mix, rate) = self._rates(xBC, rates)
        z = z.unflatten(-1, (spec.n_heads, spec.head_dim))
        inputs = Mamba3Inputs(x, B, C, -decay * dt, dt, mix, rate, None if spec.outproj_norm else z)
        if spec.mimo_rank is not None:
            mimo = (self.mimo_x, self.mimo_z, self.mimo_o)
            return kernel_mimo(inputs, self.B_bias, self.C_bias, self.D, *mimo, seq.starts)
        y = kernel_siso(inputs, self.B_bias, self.C_bias, self.D, seq.starts)
        if not spec.outproj_norm:
            return y
        y = as_dtype(y, at_least_fp32(y.dtype))
        gated: Tensor = self._gated_step(y.flatten(0, 1).unsqueeze(1), z.flatten(0, 1)).unflatten(0, y.shape[:2])
        return gated

    def _scanned(self, steps: _Steps, seq: SequenceInfo, cache: StateCache | None) -> Tensor:
        """What the scan gives, in tiles (H, chunks, B, R, Q, P)."""
        x, B, C, log_decay, own, previous, theta = steps
        state = None if cache is None else cache["ssm"]
        if state is not None and cache is not None and previous is not None:
            state = carried_state(state, cache["k"], cache["v"], previous, seq.padding, self._mimo_x)
        y, state = mimo_scan(
            x,
            log_decay,
            own if previous is None else write_weight(own, previous, seq.valid),
            own,
            B,
            C,
            self.B_bias,
            self.C_bias,
            theta,
            self._mimo_x,
            self.D,
            initial_state=state,
            starts=seq.starts,
            adjacent=self.adjacent,
            chunk=self.spec.chunk,
        )
        if cache is not None:
            angle = None if theta is None else theta[..., -1]
            k = None if previous is None else turned(B[:, -1], self.B_bias, angle, adjacent=self.adjacent)
            self._remember(steps, state, angle, k, seq, cache)
        return y

    def _stepped(self, steps: _Steps, seq: SequenceInfo, cache: StateCache) -> Tensor:
        """The output of every rank for the one token there is: (B, R, H, P)."""
        x, B, C, log_decay, own, previous, theta = steps
        decay, angle = log_decay[:, 0].exp(), None if theta is None else theta[..., 0]
        if seq.starts is not None:
            decay = decay.masked_fill(seq.starts, 0.0)
        both = torch.cat((B[:, 0], C[:, 0]), 1), torch.cat((self.B_bias, self.C_bias), 1)
        k, c = turned(*both, angle, adjacent=self.adjacent).chunk(2, 1)
        before = (
            None if previous is None else (previous[:, 0], as_dtype(cache["k"], k.dtype), as_dtype(cache["v"], k.dtype))
        )
        x_t, state = as_dtype(x[:, 0], k.dtype), as_dtype(cache["ssm"], k.dtype)
        y, state = trapezoid_step(
            x_t, decay, own[:, 0], k, c, self.D, self._mimo_x, state, before=before, overwrite=True
        )
        self._remember(steps, state, angle, None if previous is None else k, seq, cache)
        return y

    @property
    def _mimo_x(self) -> Tensor | None:
        return None if self.spec.mimo_rank is None else self.mimo_x

    def _gated(self, y: Tensor, z: Tensor) -> Tensor:
        spec = self.spec
        if spec.outproj_norm:
            y = F.rms_norm(y, (spec.head_dim,), None, spec.norm_eps) * self.norm.weight.to(y.dtype).view(
                spec.n_heads, 1, 1, 1, 1, -1
            )
        if spec.mimo_rank is None:
            return y.permute(2, 1, 4, 3, 0, 5).flatten(1, 3)[:, : z.shape[1]] * F.silu(z.to(y.dtype))
        return mimo_gate(y, z, self.mimo_z, self.mimo_o)

    def _gated_step(self, y: Tensor, z: Tensor) -> Tensor:
        """``_gated`` of one token: y (B, R, H, P), z (B, H, P)."""
        if self.spec.outproj_norm:
            y = F.rms_norm(y, y.shape[-1:], None, self.spec.norm_eps) * as_dtype(self.norm.weight, y.dtype).view(
                y.shape[2:]
            )
        if self.spec.mimo_rank is None:
            return y[:, 0] * F.silu(as_dtype(z, y.dtype))
        return mimo_gate_step(y, z, self.mimo_z, self.mimo_o)

    def _remember(
        self, steps: _Steps, state: Tensor, theta: Tensor | None, k: Tensor | None, seq: SequenceInfo, cache: StateCache
    ) -> None:
        """Brings the cache up to date, theta and k those of the last token; a row without any token keeps what it
        has."""
        new = {"ssm": state}
        if theta is not None:
            new["angle"] = theta
        if k is not None:
            new["k"] = k
            new["v"] = steps.x[:, -1]
        if seq.valid is not None:
            some = seq.valid[:, -1]
            new = {
                name: torch.where(some.view(-1, *(1,) * (t.dim() - 1)), t.to(cache[name].dtype), cache[name])
                for name, t in new.items()
            }
        cache.update(new)

    def new_cache(self, batch: int, max_len: int, *, dtype: torch.dtype, device: torch.device) -> StateCache:
        spec, wide = self.spec, at_least_fp32(dtype)
        heads = spec.n_heads
        states = {"ssm": torch.zeros(batch, heads, spec.head_dim, spec.d_state, dtype=wide, device=device)}
        if spec.complex_rope:
            states["angle"] = torch.zeros(batch, heads, spec.n_angles, dtype=wide, device=device)
        if spec.trapezoidal:
            states["k"] = torch.zeros(batch, spec.rank, heads, spec.d_state, dtype=wide, device=device)
            states["v"] = torch.zeros(batch, heads, spec.head_dim, dtype=wide, device=device)
        if spec.use_conv:
            states["conv"] = torch.zeros(batch, spec.d_conv - 1, spec.conv_channels, dtype=dtype, device=device)
        return StateCache(states)

    def flops(self, context: int, phase: Phase) -> float:
        spec = self.spec
        state = 2 * 2 * spec.rank * spec.d_inner * spec.d_state  # each rank writes it and reads it
        if phase != "decode":
            chunk = min(spec.chunk, context)  # each token and rank meets the whole tile of its chunk, masked or not
            state += 2 * spec.rank * (chunk * spec.rank) * (spec.n_heads * spec.d_state + spec.d_inner)
        projections = linear_flops(self.in_proj, self.out_proj) + 2 * spec.d_conv * spec.conv_channels
        return PASSES[phase] * (projections + state)

    def reset_parameters(self, init: Init) -> None:
        super().reset_parameters(init)
        reset_step_bias(self.dt_bias, self.spec.dt_range)
        for ones in (self.B_bias, self.C_bias, self.D):
            nn.init.ones_(ones)
        if self.spec.mimo_rank is not None:
            nn.init.constant_(self.mimo_x, 1 / self.spec.mimo_rank)
            nn.init.ones_(self.mimo_z)
            nn.init.constant_(self.mimo_o, 1 / self.spec.mimo_rank)

    def param_specs(self) -> dict[str, ParamSpec]:
        return super().param_specs() | {"in_proj.weight": fused(*self.row_blocks)}

    def metrics(self) -> dict[str, Tensor]:
        return step_metrics(self.dt_bias)

    @classmethod
    def kernel_needs(cls, spec: Mamba3Spec, use: KernelUse) -> Iterable[Need]:
        if spec.use_conv:
            yield conv_need(spec.conv_channels, spec.d_conv, use)
        reason = _refusal(spec, use.dtype, shared_memory_kb=use.shared_memory_kb)
        sizes = Sizes(head_dim=spec.head_dim, d_state=spec.d_state, rank=spec.rank, angles=spec.n_angles)
        name = "SISO" if spec.mimo_rank is None else "MIMO"
        yield Need("mamba3", f"mamba3_{name.lower()}", f"Mamba-3 {name}", reason, (sizes,))


def _refusal(
    spec: Mamba3Spec,
    dtype: torch.dtype,
    *,
    padding: bool = False,
    length: int | None = None,
    shared_memory_kb: float | None = None,
) -> str | None:
    """Why the compiled kernel cannot run the layer, None: it can. length: tokens of a row, of one document."""
    widths = (spec.d_state, spec.head_dim)
    reason = mamba3_refusal(*widths, spec.n_angles, dtype, trapezoidal=spec.trapezoidal, padding=padding)
    if reason or spec.mimo_rank is None:
        return reason
    shape, gated = (*widths, spec.mimo_rank, spec.n_angles), not spec.outproj_norm
    return mimo_refusal(
        *shape, heads=spec.n_heads, groups=spec.n_groups, gated=gated, length=length, shared_memory_kb=shared_memory_kb
    )
