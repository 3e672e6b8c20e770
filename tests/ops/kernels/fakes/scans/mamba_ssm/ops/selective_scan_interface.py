"""Mamba-1."""

from __future__ import annotations

import torch

from mamba_ssm import calls


def selective_scan_fn(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):
    calls.append("selective_scan_fn")
    batch, dim, length = u.shape
    assert u.dtype == delta.dtype == B.dtype == C.dtype
    assert A.dtype == D.dtype == torch.float32
    assert A.shape == (dim, A.shape[1])
    assert delta.shape == u.shape
    assert B.shape == C.shape == (batch, A.shape[1], length)
    assert z is None
    assert delta_bias is None
    assert not delta_softplus
    h, ys = u.new_zeros(batch, dim, A.shape[1]), []
    for t in range(length):
        step = delta[:, :, t, None]
        h = torch.exp(step * A) * h + step * u[:, :, t, None] * B[:, None, :, t]
        ys.append((h * C[:, None, :, t]).sum(-1) + D * u[:, :, t])
    y = torch.stack(ys, 2)
    return (y, h) if return_last_state else y
