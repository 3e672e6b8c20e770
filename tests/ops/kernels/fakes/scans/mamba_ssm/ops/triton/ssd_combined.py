"""Mamba-2: the scan, and the layer in one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from causal_conv1d.cpp_functions import causal_conv1d_bwd_function, causal_conv1d_fwd_function, convolved  # noqa: F401

from mamba_ssm import calls


def mamba_chunk_scan_combined(
    x,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    cu_seqlens=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    return_varlen_states=False,
):
    calls.append("mamba_chunk_scan_combined")
    assert z is None
    assert dt_bias is None
    assert not dt_softplus
    assert cu_seqlens is None
    assert chunk_size & (chunk_size - 1) == 0
    y, state = _scan(x, dt, A, B, C, D, initial_states, seq_idx)
    return (y, state) if return_final_states else y


def _scan(x, dt, A, B, C, D, initial_states, seq_idx):
    batch, length, heads, width = x.shape
    groups, d_state = B.shape[2:]
    assert x.dtype == B.dtype == C.dtype
    assert A.dtype == torch.float32
    assert A.shape == D.shape == (heads,)
    assert dt.shape == (batch, length, heads)
    assert seq_idx is None or (seq_idx.dtype == torch.int32 and seq_idx.shape == (batch, length))
    assert initial_states is None or initial_states.shape == (batch, heads, width, d_state)
    B, C = (tensor.float().repeat_interleave(heads // groups, 2) for tensor in (B, C))
    state = (
        x.new_zeros(batch, heads, width, d_state, dtype=torch.float32)
        if initial_states is None
        else initial_states.float()
    )
    current, ys = torch.zeros(batch, dtype=torch.int32, device=x.device), []
    for t in range(length):
        keep = torch.exp(dt[:, t].float() * A)
        if seq_idx is not None:
            keep = keep * (seq_idx[:, t] == current).unsqueeze(1)
            current = seq_idx[:, t]
        written = dt[:, t].float()[..., None, None] * x[:, t].float().unsqueeze(-1) * B[:, t].unsqueeze(2)
        state = state * keep[..., None, None] + written
        ys.append((state * C[:, t].unsqueeze(2)).sum(-1) + D.unsqueeze(-1) * x[:, t].float())
    return torch.stack(ys, 1).to(x.dtype), state


def mamba_split_conv1d_scan_combined(
    zxbcdt,
    conv1d_weight,
    conv1d_bias,
    dt_bias,
    A,
    D,
    chunk_size,
    initial_states=None,
    seq_idx=None,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    activation="silu",
    rmsnorm_weight=None,
    rmsnorm_eps=1e-6,
    outproj_weight=None,
    outproj_bias=None,
    headdim=None,
    ngroups=1,
    norm_before_gate=True,
):
    calls.append("mamba_split_conv1d_scan_combined")
    (heads,) = D.shape
    dim = heads * headdim
    d_state = (conv1d_weight.shape[0] - dim) // ngroups // 2
    assert zxbcdt.shape[-1] == 2 * dim + 2 * ngroups * d_state + heads
    assert initial_states is None
    assert not return_final_states
    assert outproj_bias is None
    z, xbc, dt = zxbcdt.split((dim, dim + 2 * ngroups * d_state, heads), -1)
    xbc = convolved(
        xbc.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx, None, activation in ("silu", "swish")
    ).transpose(1, 2)
    x, B, C = xbc.split((dim, ngroups * d_state, ngroups * d_state), -1)
    dt = F.softplus(dt.float() + dt_bias).clamp(*dt_limit)
    y, _ = _scan(
        x.unflatten(-1, (heads, headdim)),
        dt,
        A,
        B.unflatten(-1, (ngroups, -1)),
        C.unflatten(-1, (ngroups, -1)),
        D,
        None,
        seq_idx,
    )
    y, gate = y.flatten(2).float(), F.silu(z.float())
    u = y if norm_before_gate else y * gate
    groups = u.unflatten(-1, (ngroups, -1))
    out = (groups * (groups.square().mean(-1, keepdim=True) + rmsnorm_eps).rsqrt()).flatten(-2) * rmsnorm_weight.float()
    return F.linear((out * gate if norm_before_gate else out).to(zxbcdt.dtype), outproj_weight)
