"""Mamba-3 token by token, in float32: what both stand-ins compute."""

from __future__ import annotations

import math

import torch


def mamba3_tokens(Q, K, V, ADT, DT, Trap, Q_bias, K_bias, Angles, D, up, edges, *, half_split):
    """Q, K: (B, T, R, G, N); V: (B, T, H, P); ADT, DT, Trap: (B, H, T); biases: (H, R, N); Angles: (B, T, H, n); D:
    (H,); up: (H, R, P). edges: where sequences begin and end in the one row there is, or None. Returns (B, T, R, H,
    P)."""
    batch, length, _, _, d_state = Q.shape
    heads = V.shape[2]
    begins = {0} if edges is None else set(edges.tolist()[:-1])
    if edges is not None:
        assert batch == 1
        assert edges.dtype == torch.int32
        assert edges[-1] == length
    ys, n = [], Angles.shape[-1]
    for t in range(length):
        if t in begins:
            theta = V.new_zeros(batch, heads, n, dtype=torch.float32)
            state = V.new_zeros(batch, heads, V.shape[3], d_state, dtype=torch.float32)
            before = torch.zeros_like(state)
        theta = theta + math.pi * Angles[:, t].float().tanh() * DT[:, :, t, None]
        mix, decay = Trap[:, :, t].float().sigmoid(), ADT[:, :, t].exp()
        k, c = _of(K, K_bias, t, heads, theta, half_split), _of(Q, Q_bias, t, heads, theta, half_split)
        values = V[:, t].float().unsqueeze(2) * up  # (B, H, R, P)
        written = torch.einsum("bhrp,bhrn->bhpn", values, k)
        last, own = (weight[..., None, None] for weight in ((1 - mix) * DT[:, :, t], mix * DT[:, :, t]))
        state = decay[..., None, None] * (state + last * before) + own * written
        before = written
        ys.append(torch.einsum("bhpn,bhrn->bhrp", state, c) + D[:, None, None] * values)
    return torch.stack(ys, 1).transpose(2, 3)


def _of(bc, bias, t, heads, theta, half_split):
    """(B, H, R, N) of one token, biased and turned."""
    groups = bc.shape[3]
    biased = bc[:, t].float().repeat_interleave(heads // groups, 2).transpose(1, 2) + bias
    return _turned(biased, theta.unsqueeze(2), half_split)


def _turned(v, theta, half_split):
    n, width = theta.shape[-1], v.shape[-1]
    first = torch.arange(n) if half_split else 2 * torch.arange(n)
    second = first + (width // 2 if half_split else 1)
    out = v.clone()
    out[..., first] = v[..., first] * theta.cos() - v[..., second] * theta.sin()
    out[..., second] = v[..., second] * theta.cos() + v[..., first] * theta.sin()
    return out
