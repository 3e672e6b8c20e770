"""A stand-in for causal-conv1d 1.6.2: its functions' parameters and checks, computed with plain torch. ``calls``
counts."""

from __future__ import annotations

import torch

from causal_conv1d.cpp_functions import convolved

calls: list[str] = []


def causal_conv1d_fn(
    x,
    weight,
    bias=None,
    seq_idx=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):
    calls.append("causal_conv1d_fn")
    assert activation in (None, "silu", "swish")
    assert not return_final_states
    assert final_states_out is None
    batch, channels, length = x.shape
    assert x.dtype in (torch.float32, torch.float16, torch.bfloat16)
    assert weight.dtype in (torch.float32, torch.float16, torch.bfloat16)
    assert weight.shape == (channels, weight.shape[1])
    assert bias.dtype == weight.dtype
    assert bias.shape == (channels,)
    assert 2 <= weight.shape[1] <= 4
    assert x.stride(1) == 1, "not channels last"
    assert x.stride(2) > 1
    assert channels % 8 == 0
    assert x.stride(0) % 8 == 0
    assert x.stride(2) % 8 == 0
    if seq_idx is not None:
        assert initial_states is None
        assert seq_idx.dtype == torch.int32
        assert seq_idx.is_contiguous()
        assert seq_idx.shape == (batch, length)
    if initial_states is not None:
        assert initial_states.dtype == x.dtype
        assert initial_states.shape == (batch, channels, weight.shape[1] - 1)
        assert initial_states.stride(1) == 1
        # The package does not check these; its kernel reads 16 bytes at once (csrc/causal_conv1d_fwd.cu, vec_t).
        assert initial_states.stride(0) % 8 == 0
        assert initial_states.stride(2) % 8 == 0
        assert initial_states.storage_offset() % 8 == 0
    return convolved(x, weight, bias, seq_idx, initial_states, activation is not None)
