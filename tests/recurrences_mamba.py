"""Mamba-1, Mamba-2 and Mamba-3 token by token. Each continues the states it is given, and returns them after the last
token."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from formulas import Params, causal_conv, group_rms_norm, rms_norm, sigmoid, silu, softplus
from torch import Tensor

from hybridlm.config.mixers.mamba1 import Mamba1Spec
from hybridlm.config.mixers.mamba2 import Mamba2Spec
from hybridlm.config.mixers.mamba3 import Mamba3Spec


class Mamba1States(NamedTuple):
    """``conv`` (B, T, E): every input of the convolution so far; ``ssm`` (B, E, N): the state after the last token."""

    conv: Tensor
    ssm: Tensor


class Mamba2States(NamedTuple):
    """``conv`` (B, T, conv_channels): every input of the convolution so far; ``ssm`` (B, H, P, N): the state after the
    last token."""

    conv: Tensor
    ssm: Tensor


class Mamba3States(NamedTuple):
    """``angle`` (B, H, n_angles), not wrapped; ``ssm`` (B, H, P, N); ``k`` (B, R, H, N) and ``v`` (B, H, P) of the last
    token; ``conv`` (B, T, conv_channels): every input of the convolution so far, None without one."""

    angle: Tensor
    ssm: Tensor
    k: Tensor
    v: Tensor
    conv: Tensor | None


def mamba1(p: Params, u: Tensor, spec: Mamba1Spec, past: Mamba1States | None = None) -> tuple[Tensor, Mamba1States]:
    """One Mamba-1 layer on u (B,T,D): ``h_t = exp(dt A) h_(t-1) + (dt c) B_t``, ``y_t = h_t C_t + D c``."""
    batch, time, _ = u.shape
    zero = u.new_zeros(())
    conv_in, z = torch.split(u @ p["in_proj.weight"].T + p.get("in_proj.bias", zero), spec.d_inner, dim=-1)
    c = silu(causal_conv(conv_in, p["conv1d.weight"], p["conv1d.bias"], past.conv if past else None))
    low_rank, B, C = torch.split(c @ p["x_proj.weight"].T, [spec.dt_rank, spec.d_state, spec.d_state], dim=-1)
    dt = softplus(low_rank @ p["dt_proj.weight"].T + p["dt_proj.bias"])
    A = -torch.exp(p["A_log"])
    state = past.ssm if past else u.new_zeros(batch, spec.d_inner, spec.d_state)
    outputs = []
    for t in range(time):
        state = torch.exp(dt[:, t, :, None] * A) * state + (dt[:, t] * c[:, t])[:, :, None] * B[:, t, None, :]
        outputs.append((state * C[:, t, None, :]).sum(-1) + p["D"] * c[:, t])
    y = torch.stack(outputs, dim=1) * silu(z)
    conv_states = conv_in if past is None else torch.cat([past.conv, conv_in], dim=1)
    return y @ p["out_proj.weight"].T + p.get("out_proj.bias", zero), Mamba1States(conv_states, state)


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``S_t = exp(dt A) S_(t-1) + dt x_t B_t^T``, ``y_t = S_t C_t + D x_t``.

    x (B,T,H,P), dt (B,T,H) after softplus, A (H) negative, B and C (B,T,G,N), D (H). Returns y (B,T,H,P) and the last
    state (B,H,P,N).
    """
    batch, time, heads, width = x.shape
    group_of_head = [h // (heads // B.shape[2]) for h in range(heads)]
    state = x.new_zeros(batch, heads, width, B.shape[3]) if initial_state is None else initial_state
    outputs = []
    for t in range(time):
        b_t, c_t = B[:, t, group_of_head], C[:, t, group_of_head]  # (B, H, N)
        decay = torch.exp(dt[:, t] * A)[:, :, None, None]
        state = decay * state + (dt[:, t, :, None] * x[:, t])[..., None] * b_t[:, :, None, :]
        y_t = (state * c_t[:, :, None, :]).sum(-1)
        if D is not None:
            y_t = y_t + D[:, None] * x[:, t]
        outputs.append(y_t)
    return torch.stack(outputs, dim=1), state


def mamba2(p: Params, u: Tensor, spec: Mamba2Spec, past: Mamba2States | None = None) -> tuple[Tensor, Mamba2States]:
    """One Mamba-2 layer on u (B,T,D), continuing ``past``."""
    d_inner, bc = spec.n_heads * spec.head_dim, spec.n_groups * spec.d_state
    batch, time, _ = u.shape
    z, conv_in, dt = torch.split(u @ p["in_proj.weight"].T, [d_inner, d_inner + 2 * bc, spec.n_heads], dim=-1)
    conv_out = silu(causal_conv(conv_in, p["conv1d.weight"], p["conv1d.bias"], past.conv if past else None))
    x, B, C = torch.split(conv_out, [d_inner, bc, bc], dim=-1)
    low, high = spec.dt_limit
    dt = torch.clamp(softplus(dt + p["dt_bias"]), low, high)
    y, state = ssd(
        x.reshape(batch, time, spec.n_heads, spec.head_dim),
        dt,
        -torch.exp(p["A_log"]),
        B.reshape(batch, time, spec.n_groups, spec.d_state),
        C.reshape(batch, time, spec.n_groups, spec.d_state),
        p["D"],
        past.ssm if past else None,
    )
    y = y.reshape(batch, time, d_inner)
    if spec.norm_before_gate:
        y = group_rms_norm(y, p["norm.weight"], spec.n_groups, spec.norm_eps) * silu(z)
    else:
        y = group_rms_norm(y * silu(z), p["norm.weight"], spec.n_groups, spec.norm_eps)
    conv_states = conv_in if past is None else torch.cat([past.conv, conv_in], dim=1)
    return y @ p["out_proj.weight"].T, Mamba2States(conv_states, state)


def turn(vector: Tensor, angles: Tensor, neighbours: bool) -> Tensor:
    """Rotates pair i of the channels of (..., N) by angle i of (..., n): pairs (2i, 2i + 1), or (i, i + N/2). The
    others stay."""
    out = [vector[..., i] for i in range(vector.shape[-1])]
    for i in range(angles.shape[-1]):
        a, b = (2 * i, 2 * i + 1) if neighbours else (i, i + vector.shape[-1] // 2)
        cos, sin = torch.cos(angles[..., i]), torch.sin(angles[..., i])
        out[a] = vector[..., a] * cos - vector[..., b] * sin
        out[b] = vector[..., a] * sin + vector[..., b] * cos
    return torch.stack(out, dim=-1)


class Mamba3Inputs(NamedTuple):
    """What the recurrence of Mamba-3 reads of every token: z, x (B,T,H,P), B, C (B,T,R,H,N) not yet rotated, dt, A, lam
    (B,T,H), angle (B,T,n); ``conv`` the input of the convolution (B,T,C), if there is one."""

    z: Tensor
    x: Tensor
    B: Tensor
    C: Tensor
    dt: Tensor
    A: Tensor
    lam: Tensor
    angle: Tensor
    conv: Tensor | None


def mamba3_inputs(p: Params, u: Tensor, spec: Mamba3Spec, past: Mamba3States | None) -> Mamba3Inputs:
    """The rows of in_proj are [z, x, B, C, dd_dt, dd_A, trap, angle], the last two only where they are used."""
    heads, bc = spec.n_heads, spec.rank * spec.n_groups * spec.d_state
    inner = heads * spec.head_dim
    n_angles = int(spec.d_state * spec.rope_fraction) // 2 if spec.complex_rope else 0
    rows = [inner, inner + 2 * bc, heads, heads, heads if spec.trapezoidal else 0, n_angles]
    z, xBC, dd_dt, dd_A, trap, angle = torch.split(u @ p["in_proj.weight"].T, rows, dim=-1)
    conv_in = None
    if spec.use_conv:
        conv_in = xBC
        xBC = silu(causal_conv(conv_in, p["conv1d.weight"], p["conv1d.bias"], past.conv if past else None))
    x, B, C = torch.split(xBC, [inner, bc, bc], dim=-1)
    group_of_head = [h // (heads // spec.n_groups) for h in range(heads)]

    def per_head(rows_of: Tensor, name: str) -> Tensor:
        ranks = rows_of.reshape(*u.shape[:2], spec.rank, spec.n_groups, spec.d_state)
        return rms_norm(ranks, p[f"{name}_norm.weight"], spec.norm_eps)[..., group_of_head, :] + p[
            f"{name}_bias"
        ].transpose(0, 1)

    if spec.a_activation == "softplus":
        rate = softplus(dd_A)
    else:
        rate = torch.where(dd_A >= 0, 1 + dd_A, 1 / (1 - torch.clamp(dd_A, max=0)))
    return Mamba3Inputs(
        z.reshape(*u.shape[:2], heads, spec.head_dim),
        x.reshape(*u.shape[:2], heads, spec.head_dim),
        per_head(B, "B"),
        per_head(C, "C"),
        softplus(dd_dt + p["dt_bias"]),
        -torch.clamp(rate, min=spec.a_floor),
        sigmoid(trap) if spec.trapezoidal else torch.ones_like(dd_dt),
        angle,
        conv_in,
    )


def mamba3(p: Params, u: Tensor, spec: Mamba3Spec, past: Mamba3States | None = None) -> tuple[Tensor, Mamba3States]:
    """One Mamba-3 layer on u (B,T,D), SISO or MIMO, in its exact trapezoidal form."""
    batch, time, _ = u.shape
    tokens = mamba3_inputs(p, u, spec, past)
    heads, width, siso = spec.n_heads, spec.head_dim, spec.mimo_rank is None
    one = u.new_ones(heads, spec.rank, width)
    mimo_x, mimo_z, mimo_o = (one if siso else p[name] for name in ("mimo_x", "mimo_z", "mimo_o"))
    if past is None:
        theta = u.new_zeros(batch, heads, tokens.angle.shape[-1])
        state, v = u.new_zeros(batch, heads, width, spec.d_state), u.new_zeros(batch, heads, width)
        k = u.new_zeros(batch, spec.rank, heads, spec.d_state)
    else:
        theta, state, k, v = past.angle, past.ssm, past.k, past.v
    outputs = []
    for t in range(time):
        x, z, dt, lam = tokens.x[:, t], tokens.z[:, t], tokens.dt[:, t, :, None, None], tokens.lam[:, t, :, None, None]
        alpha = torch.exp(tokens.A[:, t, :, None, None] * dt)
        theta = theta + math.pi * torch.tanh(tokens.angle[:, t, None, :]) * dt[..., 0]
        k_before, v_before, v = k, v, x
        k = torch.stack([turn(tokens.B[:, t, r], theta, siso) for r in range(spec.rank)], dim=1)
        c = torch.stack([turn(tokens.C[:, t, r], theta, siso) for r in range(spec.rank)], dim=1)
        state = alpha * state
        for r in range(spec.rank):
            before = (mimo_x[:, r] * v_before)[..., None] * k_before[:, r, :, None, :]
            now = (mimo_x[:, r] * x)[..., None] * k[:, r, :, None, :]
            state = state + (1 - lam) * dt * alpha * before + lam * dt * now
        out = torch.zeros_like(x)
        for r in range(spec.rank):
            y = (state * c[:, r, :, None, :]).sum(-1) + p["D"][:, None] * mimo_x[:, r] * x
            if spec.outproj_norm:
                y = rms_norm(y, p["norm.weight"].reshape(heads, width), spec.norm_eps)
            out = out + mimo_o[:, r] * y * silu(mimo_z[:, r] * z)
        outputs.append(out.reshape(batch, heads * width))
    conv = tokens.conv if past is None or past.conv is None else torch.cat([past.conv, tokens.conv], dim=1)
    return torch.stack(outputs, dim=1) @ p["out_proj.weight"].T, Mamba3States(theta, state, k, v, conv)
