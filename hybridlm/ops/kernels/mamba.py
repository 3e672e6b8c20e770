"""The scans of Mamba-1 and Mamba-2 through mamba-ssm (Gu & Dao)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hybridlm.ops.kernels.conv import document_index
from hybridlm.ops.kernels.graph import outside_graphs
from hybridlm.ops.norm import as_dtype

SSD_CHUNK = 256  # tokens; mamba_ssm's own default, for which its kernels are tuned


@outside_graphs
def kernel_selective_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    """``ops.selective_scan`` from no state: y (B, T, E) in x's dtype and the final state (B, E, N), of which no
    gradient is taken.

    The kernel wants all of x, dt, B and C in one dtype. The step sizes stand in exponents, so that dtype is float32.
    """
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    wide = torch.float32
    x_wide, dt, B, C = (as_dtype(tensor, wide).transpose(1, 2) for tensor in (x, dt, B, C))  # (B, channels, T)
    y, state = selective_scan_fn(
        x_wide.contiguous(),
        dt.contiguous(),
        as_dtype(A, wide).contiguous(),
        B.contiguous(),
        C.contiguous(),
        D=as_dtype(D, wide),
        z=None,
        delta_bias=None,
        delta_softplus=False,
        return_last_state=True,
    )
    return as_dtype(y.transpose(1, 2), x.dtype), state.detach()


@outside_graphs
def kernel_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial_state: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``ops.ssd``: y (B, T, H, P) in x's dtype and the final state (B, H, P, N) in float32."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    wide = torch.float32
    y, state = mamba_chunk_scan_combined(
        x,
        as_dtype(dt, wide),
        as_dtype(A, wide),
        as_dtype(B, x.dtype),
        as_dtype(C, x.dtype),
        SSD_CHUNK,
        D=as_dtype(D, wide),
        z=None,
        dt_bias=None,
        initial_states=initial_state,
        seq_idx=None if starts is None else document_index(starts),
        dt_softplus=False,
        return_final_states=True,
    )
    return as_dtype(y, x.dtype), as_dtype(state, wide)


class LayerWeights(NamedTuple):
    """Of a Mamba-2 layer behind its input projection, with mamba_ssm's names."""

    conv_weight: Tensor  # (C, 1, K)
    conv_bias: Tensor
    dt_bias: Tensor  # (H,)
    A_log: Tensor  # (H,)
    D: Tensor  # (H,)
    norm: Tensor  # (d_inner,)
    out_proj: Tensor  # (d_model, d_inner)


@outside_graphs
def kernel_mamba2_layer(
    zxbcdt: Tensor,
    weights: LayerWeights,
    starts: Tensor | None,
    *,
    head_dim: int,
    n_groups: int,
    dt_limit: tuple[float, float],
    norm_eps: float,
    norm_before_gate: bool,
) -> Tensor:
    """Everything of a Mamba-2 layer behind ``in_proj``, which gave (B, T, [z, x, B, C, dt]): (B, T, d_model). The
    backward computes the convolution and the norm again instead of keeping them."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined

    wide = torch.float32
    out: Tensor = mamba_split_conv1d_scan_combined(
        zxbcdt,
        weights.conv_weight[:, 0],
        as_dtype(weights.conv_bias, weights.conv_weight.dtype),
        as_dtype(weights.dt_bias, wide),
        -as_dtype(weights.A_log, wide).exp(),
        as_dtype(weights.D, wide),
        SSD_CHUNK,
        seq_idx=None if starts is None else document_index(starts),
        dt_limit=dt_limit,
        activation="silu",
        rmsnorm_weight=weights.norm,
        rmsnorm_eps=norm_eps,
        outproj_weight=as_dtype(weights.out_proj, zxbcdt.dtype),
        outproj_bias=None,
        headdim=head_dim,
        ngroups=n_groups,
        norm_before_gate=norm_before_gate,
    )
    return out
