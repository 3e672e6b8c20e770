"""The functions behind causal-conv1d's own, which mamba-ssm's layer in one kernel calls directly."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def convolved(x, weight, bias, seq_idx, initial_states, silu):
    """(B, C, T), tap by tap."""
    width, length = weight.shape[1], x.shape[2]
    front = x.new_zeros(*x.shape[:2], width - 1) if initial_states is None else initial_states
    line = torch.cat((front, x), 2).float()
    out = bias.float().view(1, -1, 1).expand(x.shape)
    for k in range(width):
        taken = line[:, :, k : k + length] * weight[:, k].float().view(1, -1, 1)
        if seq_idx is not None:
            lag = width - 1 - k
            before = F.pad(seq_idx, (lag, 0), value=-1)[:, :length]
            taken = taken * (before == seq_idx).unsqueeze(1)
        out = out + taken
    return (F.silu(out) if silu else out).to(x.dtype)


def causal_conv1d_fwd_function(x, weight, bias, seq_idx, initial_states, final_states_out, silu_activation):
    assert final_states_out is None
    return (
        convolved(x, weight, bias, seq_idx, initial_states, silu_activation)
        .transpose(1, 2)
        .contiguous()
        .transpose(1, 2)
    )


def causal_conv1d_bwd_function(
    x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx, return_dinitial_states, silu_activation
):
    inputs = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
    with torch.enable_grad():
        grads = torch.autograd.grad(convolved(*inputs, seq_idx, initial_states, silu_activation), inputs, dout)
    if dx is not None:
        dx.copy_(grads[0])
    return (dx if dx is not None else grads[0], *grads[1:], None)


def causal_conv1d_update_function(x, conv_state, weight, bias, silu_activation, cache_seqlens, conv_state_indices):
    raise NotImplementedError
