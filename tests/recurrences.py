"""References the tests compare against: every layer token by token in float64, from its equations and with no code of the package.

They are loops on purpose. Nothing is chunked, fused, padded or shared with ``hybridlm.ops``; autograd differentiates them.
``p`` maps a parameter's name to its tensor, as ``dict(module.named_parameters())`` does.
Shape letters: B batch, T time, D d_model, H heads, P head_dim, N d_state, G groups, V vocabulary, K conv width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hybridlm.config.layers import AttentionSpec, LayerSpec, Mamba2Spec, MLPSpec
from hybridlm.config.model import ModelConfig

Params = Mapping[str, Tensor]


class Mamba2States(NamedTuple):
    """``conv`` (B, T, conv_channels): every input of the convolution so far; ``ssm`` (B, H, P, N): the state after the last token."""

    conv: Tensor
    ssm: Tensor


def relative_error(got: Tensor, want: Tensor) -> float:
    """max|got - want| / max|want|, in float64: the metric of every comparison. Shapes must agree."""
    assert got.shape == want.shape, f"{tuple(got.shape)} is not {tuple(want.shape)}"
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-300))


def assert_near(got: Mapping[str, Tensor], want: Mapping[str, Tensor], tolerance: float) -> None:
    """Every tensor of ``want`` is in ``got``, and no other, within ``tolerance`` relative to its largest value."""
    assert got.keys() == want.keys()
    errors = {name: relative_error(got[name], want[name]) for name in want}
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"relative errors above {tolerance}: {wrong}"


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def silu(x: Tensor) -> Tensor:
    return x * sigmoid(x)


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) with no threshold."""
    return torch.logaddexp(x, torch.zeros_like(x))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def group_rms_norm(x: Tensor, weight: Tensor, n_groups: int, eps: float) -> Tensor:
    """Each of ``n_groups`` equal slices of the last dimension has its own mean square."""
    width = x.shape[-1] // n_groups
    slices = [slice(g * width, (g + 1) * width) for g in range(n_groups)]
    return torch.cat([rms_norm(x[..., s], weight[s], eps) for s in slices], dim=-1)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, past: Tensor | None = None) -> Tensor:
    """Depthwise: ``out_t = bias + sum_k weight[:, k] * x_(t-K+1+k)``. x (B,T,C), weight (C,1,K); ``past`` (B,any,C) came before."""
    taps = weight.reshape(weight.shape[0], -1)
    width = taps.shape[1]
    before = x.new_zeros(x.shape[0], width - 1, x.shape[2])
    if past is not None:
        before = torch.cat([before, past], dim=1)
    line = torch.cat([before, x], dim=1)
    outputs = []
    for t in range(x.shape[1]):
        now = before.shape[1] + t
        out = bias.expand(x.shape[0], -1)
        for k in range(width):
            out = out + taps[:, k] * line[:, now - width + 1 + k]
        outputs.append(out)
    return torch.stack(outputs, dim=1)


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``S_t = exp(dt A) S_(t-1) + dt x_t B_t^T``, ``y_t = S_t C_t + D x_t``.

    x (B,T,H,P), dt (B,T,H) after softplus, A (H) negative, B and C (B,T,G,N), D (H). Returns y (B,T,H,P) and the last state (B,H,P,N).
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


def rotate(head: Tensor, position: int, theta: float) -> Tensor:
    """Half-split rotary positions on one vector (..., P): channel i turns with channel i + P/2 by position * theta^(-2i/P)."""
    half = head.shape[-1] // 2
    out = [head[..., i] for i in range(2 * half)]
    for i in range(half):
        angle = position * theta ** (-2 * i / (2 * half))
        a, b = head[..., i], head[..., i + half]
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return torch.stack(out, dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None) -> Tensor:
    """Causal softmax attention by loops over heads and queries. q (B,T,H,P), k and v (B,S,Hkv,P): the queries are the last T positions.

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
        q = torch.stack([rotate(q[:, t], t, spec.rope_theta) for t in range(time)], dim=1)
        k = torch.stack([rotate(k[:, t], t, spec.rope_theta) for t in range(time)], dim=1)
    y = attend(q, k, v, spec.scale, spec.window)
    return y.reshape(batch, time, -1) @ p["o_proj.weight"].T, k, v


def mlp(p: Params, x: Tensor, spec: MLPSpec) -> Tensor:
    if spec.activation == "swiglu":
        hidden = silu(x @ p["gate_proj.weight"].T) * (x @ p["up_proj.weight"].T)
    else:
        hidden = torch.clamp(x @ p["up_proj.weight"].T, min=0) ** 2
    return hidden @ p["down_proj.weight"].T


def scaled_logits(hidden: Tensor, head: Tensor, vocab_size: int, scale: float = 1.0, softcap: float | None = None) -> Tensor:
    """Logits (..., V_padded): scaled, then capped, then -inf for the ids past ``vocab_size``."""
    logits = scale * (hidden @ head.T)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    padding = torch.arange(head.shape[0]) >= vocab_size
    return logits.masked_fill(padding, -math.inf)


def cross_entropy(
    hidden: Tensor, head: Tensor, targets: Tensor, vocab_size: int, scale: float = 1.0, softcap: float | None = None, ignore: int = -100
) -> tuple[Tensor, int]:
    """Sum of -log p(target) over the targets that are not ``ignore``, row by row; hidden (R,D), targets (R). Returns it and their count."""
    total, count = hidden.sum() * 0, 0
    for row, target in zip(hidden, targets.tolist(), strict=True):
        if target == ignore:
            continue
        logits = scaled_logits(row, head, vocab_size, scale, softcap)[:vocab_size]
        total = total + torch.log(torch.exp(logits - logits.max().detach()).sum()) + logits.max().detach() - logits[target]
        count += 1
    return total, count


def below(p: Params, prefix: str) -> dict[str, Tensor]:
    """The parameters whose names start with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in p.items() if name.startswith(prefix)}


def language_model(p: Params, ids: Tensor, layers: Sequence[LayerSpec], model: ModelConfig, vocab_size: int) -> Tensor:
    """Logits (B,T,V_padded) of a whole model on ids (B,T): embedding, pre-norm blocks, final norm, head, with every multiplier."""
    eps, add = model.norm_eps, model.residual_scale
    x = model.embedding_scale * p["embedding.weight"][ids]
    for index, layer in enumerate(layers):
        inner = below(p, f"blocks.{index}.")
        mixer = below(inner, "mixer.")
        normed = rms_norm(x, inner["mixer_norm.weight"], eps)
        x = x + add * (attention if isinstance(layer.params, AttentionSpec) else mamba2)(mixer, normed, layer.params)[0]
        if layer.ffn is not None:
            x = x + add * mlp(below(inner, "ffn."), rms_norm(x, inner["ffn_norm.weight"], eps), layer.ffn)
    head = p["embedding.weight"] if model.tie_embeddings else p["lm_head.weight"]
    return scaled_logits(rms_norm(x, p["norm.weight"], eps), head, vocab_size, model.logit_scale, model.logit_softcap)
