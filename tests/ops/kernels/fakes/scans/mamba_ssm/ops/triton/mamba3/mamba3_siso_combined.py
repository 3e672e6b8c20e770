"""Mamba-3 of one rank."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mamba_ssm import calls
from mamba_ssm.ops.mamba3_tokens import mamba3_tokens


def mamba3_siso_combined(
    Q,
    K,
    V,
    ADT,
    DT,
    Trap,
    Q_bias,
    K_bias,
    Angles,
    D=None,
    Z=None,
    Input_States=None,
    chunk_size=64,
    return_final_states=False,
    cu_seqlens=None,
):
    calls.append("mamba3_siso_combined")
    batch, length, _, d_state = Q.shape
    heads = V.shape[2]
    assert Input_States is None
    assert not return_final_states
    assert ADT.shape == DT.shape == Trap.shape == (batch, heads, length)
    assert ADT.dtype == DT.dtype == Q_bias.dtype == D.dtype == torch.float32
    assert Q_bias.shape == K_bias.shape == (heads, d_state)
    assert Angles.shape[:3] == (batch, length, heads)
    assert Angles.shape[3] % 2 == 0
    assert Z is None or Z.shape == V.shape
    Q, K, V, Trap, Angles = (tensor.to(torch.bfloat16) for tensor in (Q, K, V, Trap, Angles))
    up = torch.ones(heads, 1, V.shape[3], device=V.device)
    biases = (Q_bias.unsqueeze(1), K_bias.unsqueeze(1))
    y = mamba3_tokens(
        Q.unsqueeze(2), K.unsqueeze(2), V, ADT, DT, Trap, *biases, Angles, D, up, cu_seqlens, half_split=False
    ).squeeze(2)
    return (y if Z is None else y * F.silu(Z.float())).to(torch.bfloat16)
