"""Softmax attention by loops over heads and queries: grouped queries, and DeepSeek's latent attention in its plain
form."""

from __future__ import annotations

import math

import torch
from formulas import Params, rms_norm
from torch import Tensor

from hybridlm.config.mixers.attention import AttentionSpec
from hybridlm.config.mixers.mla import MLASpec

LATENT_EPS = 1e-6  # of both norms of latent attention, whatever the model's is


def rotate(head: Tensor, position: int, theta: float) -> Tensor:
    """Half-split rotary positions on one vector (..., P): channel i turns with channel i + P/2 by position *
    theta^(-2i/P)."""
    half = head.shape[-1] // 2
    out = [head[..., i] for i in range(2 * half)]
    for i in range(half):
        angle = position * theta ** (-2 * i / (2 * half))
        a, b = head[..., i], head[..., i + half]
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return torch.stack(out, dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None) -> Tensor:
    """Causal softmax attention by loops over heads and queries. q (B,T,H,P), k and v (B,S,Hkv,P): the queries are the
    last T positions.

    ``window`` counts the token itself: position i sees i - window + 1 ... i.
    """
    batch, time, heads, _ = q.shape
    per_kv = heads // k.shape[2]
    rows = []
    for h in range(heads):
        keys, values = k[:, :, h // per_kv], v[:, :, h // per_kv]
        line = []
        for t in range(time):
            now = k.shape[1] - time + t
            first = 0 if window is None else max(0, now - window + 1)
            scores = scale * (keys[:, first : now + 1] * q[:, t, None, h]).sum(-1)  # (B, visible)
            weights = torch.exp(scores - scores.max(dim=1, keepdim=True).values.detach())
            weights = weights / weights.sum(1, keepdim=True)
            line.append((weights[..., None] * values[:, first : now + 1]).sum(1))
        rows.append(torch.stack(line, dim=1))
    return torch.stack(rows, dim=2).reshape(batch, time, heads, v.shape[3])


def attention(p: Params, u: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor, Tensor]:
    """One attention layer on u (B,T,D) from position 0. Returns y, and k after rotation and v, both (B,T,Hkv,P)."""
    batch, time, _ = u.shape
    q = (u @ p["q_proj.weight"].T).reshape(batch, time, spec.n_heads, spec.head_dim)
    k = (u @ p["k_proj.weight"].T).reshape(batch, time, spec.n_kv_heads, spec.head_dim)
    v = (u @ p["v_proj.weight"].T).reshape(batch, time, spec.n_kv_heads, spec.head_dim)
    if spec.qk_norm:
        q, k = rms_norm(q, p["q_norm.weight"], spec.norm_eps), rms_norm(k, p["k_norm.weight"], spec.norm_eps)
    if spec.rope:
        q, k = (rotated(vectors, spec.rope_dim, spec.rope_theta) for vectors in (q, k))
    y = attend(q, k, v, spec.scale, spec.window).reshape(batch, time, -1)
    if spec.gate:
        y = y / (1 + torch.exp(-(u @ p["g_proj.weight"].T)))
    return y @ p["o_proj.weight"].T, k, v


def rotated(vectors: Tensor, channels: int, theta: float) -> Tensor:
    """(B,T,H,P) with the first ``channels`` rotated by the place in T."""
    turned = [rotate(vectors[:, t, :, :channels], t, theta) for t in range(vectors.shape[1])]
    return torch.cat([torch.stack(turned, dim=1), vectors[..., channels:]], dim=-1)


def mla(p: Params, u: Tensor, spec: MLASpec) -> tuple[Tensor, Tensor, Tensor]:
    """Latent attention on u (B,T,D) from position 0, every key and value of every head written out.

    Returns y, the latent (B,T,c) after its norm, and the shared key (B,T,r) after the rotation: the two that are
    cached.
    """
    batch, time, _ = u.shape
    heads, nope, rope = spec.n_heads, spec.qk_nope_head_dim, spec.qk_rope_head_dim
    if spec.q_lora_rank is None:
        q = u @ p["q_proj.weight"].T
    else:
        q = rms_norm(u @ p["q_a_proj.weight"].T, p["q_a_layernorm.weight"], LATENT_EPS) @ p["q_b_proj.weight"].T
    q_nope, q_rope = torch.split(q.reshape(batch, time, heads, nope + rope), [nope, rope], dim=-1)
    latent, k_rope = torch.split(u @ p["kv_a_proj_with_mqa.weight"].T, [spec.kv_lora_rank, rope], dim=-1)
    latent = rms_norm(latent, p["kv_a_layernorm.weight"], LATENT_EPS)
    if spec.rope_interleave:  # neighbours (2i, 2i + 1) turn together; the result stands as [firsts | seconds]
        q_rope = torch.cat([q_rope[..., 0::2], q_rope[..., 1::2]], dim=-1)
        k_rope = torch.cat([k_rope[..., 0::2], k_rope[..., 1::2]], dim=-1)
    if spec.rope:
        q_rope = torch.stack([rotate(q_rope[:, t], t, spec.rope_theta) for t in range(time)], dim=1)
        k_rope = torch.stack([rotate(k_rope[:, t], t, spec.rope_theta) for t in range(time)], dim=1)
    kv = (latent @ p["kv_b_proj.weight"].T).reshape(batch, time, heads, nope + spec.v_head_dim)
    k_nope, v = torch.split(kv, [nope, spec.v_head_dim], dim=-1)
    keys = torch.cat([k_nope, torch.stack([k_rope] * heads, dim=2)], dim=-1)
    y = attend(torch.cat([q_nope, q_rope], dim=-1), keys, v, spec.scale)
    return y.reshape(batch, time, -1) @ p["o_proj.weight"].T, latent, k_rope
