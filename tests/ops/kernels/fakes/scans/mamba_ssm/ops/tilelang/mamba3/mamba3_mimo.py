"""Mamba-3 of several ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mamba_ssm import calls
from mamba_ssm.ops.mamba3_tokens import mamba3_tokens


def mamba3_mimo(
    Q,
    K,
    V,
    ADT,
    DT,
    Trap,
    Q_bias,
    K_bias,
    MIMO_V,
    MIMO_Z,
    MIMO_Out,
    Angles,
    D,
    Z,
    chunk_size,
    rotary_dim_divisor,
    dtype,
    return_state=False,
    cu_seqlens=None,
):
    calls.append("mamba3_mimo")
    batch, length, rank, _, d_state = Q.shape
    heads, width = V.shape[2:]
    assert chunk_size >= 8
    assert chunk_size * rank <= 64
    assert rotary_dim_divisor in (2, 4)
    assert Angles.shape == (batch, length, heads, d_state // rotary_dim_divisor)
    assert Angles.dtype == ADT.dtype == DT.dtype == torch.float32
    assert Q.dtype == K.dtype == V.dtype == Z.dtype == Trap.dtype == dtype == torch.bfloat16
    assert ADT.shape == DT.shape == Trap.shape == (batch, heads, length)
    assert Q_bias.shape == K_bias.shape == (heads, rank, d_state)
    assert MIMO_V.shape == MIMO_Z.shape == MIMO_Out.shape == (heads, rank, width)
    assert not return_state
    y = mamba3_tokens(Q, K, V, ADT, DT, Trap, Q_bias, K_bias, Angles, D, MIMO_V, cu_seqlens, half_split=True)
    gate = F.silu(Z.float().unsqueeze(2) * MIMO_Z.transpose(0, 1))
    return (y * gate * MIMO_Out.transpose(0, 1)).sum(2).to(dtype)
