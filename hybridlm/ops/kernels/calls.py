"""Calls of compiled kernels: causal-conv1d, mamba-ssm's scans of Mamba-1 and Mamba-2 (Gu & Dao), and Liger's linear
cross-entropy (Hsu et al. 2024, arXiv 2410.10989). Mamba-3's are in ``mamba3.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from hybridlm.ops.norm import as_dtype

SSD_CHUNK = 256  # tokens; mamba_ssm's own default, for which its kernels are tuned
P = ParamSpec("P")
R = TypeVar("R")


def outside_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, which a compiled block calls as it is, between two graphs: the packages' autograd functions,
    autotuners and device contexts are not made to be traced. (The import of torch's compiler takes seconds: only
    modules of kernels in use pay it.)"""
    return torch.compiler.disable(function)  # type: ignore[no-any-return]


def document_index(starts: Tensor) -> Tensor:
    """(B, T) int32: documents that began in the row up to each token; 0 as long as what stood before the row goes
    on."""
    return starts.cumsum(1, dtype=torch.int32)


def _aligned(rows: Tensor) -> Tensor:
    """(B, T, C) as it is where the kernel can read 8 numbers at once in it, else a copy. It checks x, but of a state,
    which may be a view of the projection before, only that channels are neighbours: reading it would end with a
    misaligned address."""
    strides = (*rows.stride()[:2], rows.storage_offset())
    return rows.contiguous() if rows.stride(2) != 1 or any(stride % 8 for stride in strides) else rows


@outside_graphs
def kernel_conv(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor | None, positions: Tensor | None) -> Tensor:
    """``ops.conv.causal_conv``'s output (B, T, C) for what ``conv_refusal`` lets through; weight and bias may be wider
    than x.

    The kernel reads (B, C, T) with channels next to each other in memory, which is our (B, T, C) seen from the side,
    and rows that begin at multiples of 8 numbers.
    """
    from causal_conv1d import causal_conv1d_fn

    x = _aligned(x)
    out: Tensor = causal_conv1d_fn(
        x.transpose(1, 2),
        weight[:, 0],
        bias=as_dtype(bias, weight.dtype),
        seq_idx=None if positions is None else document_index(positions == 0),
        initial_states=None if state is None else _aligned(as_dtype(state, x.dtype)).transpose(1, 2),
        activation="silu",
    )
    return out.transpose(1, 2)


@outside_graphs
def kernel_selective_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    """``ops.selective_scan`` from no state: y (B, T, E) in x's dtype and the final state (B, E, N), of which no
    gradient is taken.

    The kernel requires one dtype for x, dt, B and C. Step sizes appear in exponents, so that dtype is float32.
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


@outside_graphs
def kernel_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, vocab: int, ignore: int, softcap: float | None
) -> Tensor:
    """``ops.linear_cross_entropy`` at a scale of 1: the sum in float32. The rows of padded ids are cut off, and get a
    gradient of zero."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    loss: Tensor = LigerFusedLinearCrossEntropyFunction.apply(
        hidden,
        as_dtype(weight, hidden.dtype)[:vocab],
        targets,
        None,  # bias
        None,  # ce_weight
        ignore,
        0.0,  # lse_square_scale
        0.0,  # label_smoothing
        "sum",
        softcap,
        False,  # return_z_loss
        torch.float32,  # accum_dtype: of the weight's gradient over the chunks
    )[0]
    return loss
