"""The gated delta rule and its two layers token by token, from their equations: gated DeltaNet with one decay per head,
Kimi Delta Attention with one per channel of the keys."""

from __future__ import annotations

from typing import NamedTuple

import torch
from formulas import Params, causal_conv, rms_norm, sigmoid, silu, softplus
from torch import Tensor

from hybridlm.config.mixers.gdn import DeltaSpec, GDNSpec
from hybridlm.config.mixers.kda import KDASpec


class DeltaStates(NamedTuple):
    """``conv`` (B, T, channels): every input of the convolution so far, None without one; ``recurrent`` (B, H, Dk, Dv)
    after the last token."""

    conv: Tensor | None
    recurrent: Tensor


def gdn(p: Params, u: Tensor, spec: GDNSpec, past: DeltaStates | None = None) -> tuple[Tensor, DeltaStates]:
    """One layer of gated DeltaNet on u (B,T,D), continuing ``past``."""
    log_decay = -torch.exp(p["A_log"]) * softplus(u @ p["a_proj.weight"].T + p["dt_bias"])
    o, states = _core(p, u, log_decay, spec, past)
    y = rms_norm(o, p["o_norm.weight"], spec.norm_eps)
    if spec.use_gate:
        y = y * silu(u @ p["g_proj.weight"].T).reshape(y.shape)
    return y.flatten(2) @ p["o_proj.weight"].T, states


def kda(p: Params, u: Tensor, spec: KDASpec, past: DeltaStates | None = None) -> tuple[Tensor, DeltaStates]:
    """One layer of Kimi Delta Attention on u (B,T,D), continuing ``past``."""
    rate = u @ p["f_a_proj.weight"].T @ p["f_b_proj.weight"].T + p["dt_bias"]
    rate = rate.reshape(*u.shape[:2], spec.n_v_heads, spec.head_k_dim)
    A = torch.exp(p["A_log"])[:, None]
    log_decay = -A * softplus(rate) if spec.lower_bound is None else spec.lower_bound * sigmoid(A * rate)
    o, states = _core(p, u, log_decay, spec, past)
    gate = u @ p["g_a_proj.weight"].T @ p["g_b_proj.weight"].T
    if spec.gate_bias:
        gate = gate + p["g_b_proj.bias"]
    y = rms_norm(o, p["o_norm.weight"], spec.norm_eps) * sigmoid(gate).reshape(o.shape)
    return y.flatten(2) @ p["o_proj.weight"].T, states


def _core(
    p: Params, u: Tensor, log_decay: Tensor, spec: DeltaSpec, past: DeltaStates | None
) -> tuple[Tensor, DeltaStates]:
    """From a layer's input and its decays to the output (B,T,H,Dv) of the rule."""
    inputs = torch.cat([u @ p[f"{name}_proj.weight"].T for name in "qkv"], dim=-1)
    convolved, line = inputs, None
    if spec.use_conv:
        before = None if past is None else past.conv
        convolved = causal_conv(inputs, p["conv1d.weight"], u.new_zeros(inputs.shape[-1]), before)
        line = inputs if before is None else torch.cat([before, inputs], dim=1)
    keys, values = spec.n_k_heads * spec.head_k_dim, spec.n_v_heads * spec.head_v_dim
    q, k, v = torch.split(silu(convolved), [keys, keys, values], dim=-1)
    beta = sigmoid(u @ p["b_proj.weight"].T) * (2 if spec.allow_neg_eigval else 1)
    o, state = gated_delta(
        q.reshape(*q.shape[:2], spec.n_k_heads, -1),
        k.reshape(*k.shape[:2], spec.n_k_heads, -1),
        v.reshape(*v.shape[:2], spec.n_v_heads, -1),
        log_decay,
        beta,
        initial_state=None if past is None else past.recurrent,
    )
    return o, DeltaStates(line, state)


def gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    initial_state: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q, k (B,T,Hk,Dk) of any length; v (B,T,H,Dv); log_decay (B,T,H) or (B,T,H,Dk); beta (B,T,H).

    Returns o (B,T,H,Dv) and the last state (B,H,Dk,Dv); a state is taken away where a document starts, whatever is in
    it.
    """
    batch, time, heads, _ = v.shape
    key_head = [h // (heads // k.shape[2]) for h in range(heads)]
    state = v.new_zeros(batch, heads, k.shape[3], v.shape[3]) if initial_state is None else initial_state
    outputs = []
    for t in range(time):
        query, key = (
            x[:, t, key_head] / torch.sqrt((x[:, t, key_head] ** 2).sum(-1, keepdim=True) + 1e-6) for x in (q, k)
        )
        alpha = torch.exp(log_decay[:, t])
        alpha = alpha[..., None, None] if log_decay.dim() == 3 else alpha[..., None]
        kept = alpha * state
        if starts is not None:
            kept = torch.where(starts[:, t, None, None, None], torch.zeros_like(kept), kept)
        foretold = (kept * key[..., None]).sum(-2)
        state = kept + key[..., None] * (beta[:, t, :, None] * (v[:, t] - foretold))[:, :, None, :]
        outputs.append((state * query[..., None]).sum(-2) / k.shape[3] ** 0.5)
    return torch.stack(outputs, dim=1), state
