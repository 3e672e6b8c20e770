"""The two outputs of a Mamba-3 trial: our torch operators' and the kernel's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from hybridlm.ops.mimo import mimo_scan, untiled
from hybridlm.ops.trapezoid import angles, previous_weight, write_weight

if TYPE_CHECKING:
    from hybridlm.ops.kernels.mamba3 import Mamba3Inputs
    from hybridlm.ops.kernels.rules import Sizes
    from hybridlm.ops.kernels.trials import Draw


def _inputs(draw: Draw, dtype: torch.dtype, sizes: Sizes, rank: int) -> Mamba3Inputs:
    from hybridlm.ops.kernels.mamba3 import Mamba3Inputs

    row = (sizes.batch, sizes.time)
    dt = draw(*row, sizes.heads, make=lambda values: 0.3 * F.softplus(values))
    return Mamba3Inputs(
        x=draw(*row, sizes.heads, sizes.head_dim, dtype=dtype),
        B=draw(*row, rank, sizes.groups, sizes.d_state, dtype=dtype),
        C=draw(*row, rank, sizes.groups, sizes.d_state, dtype=dtype),
        log_decay=draw(*row, sizes.heads, make=lambda values: -0.3 * F.softplus(values)),
        dt=dt,
        mix=draw(*row, sizes.heads, dtype=dtype),
        rate=draw(*row, sizes.angles, dtype=dtype),
        z=draw(*row, sizes.heads, sizes.head_dim, dtype=dtype),
    )


def _scanned(
    inputs: Mamba3Inputs, B_bias: Tensor, C_bias: Tensor, D: Tensor, mimo_x: Tensor | None, starts: Tensor | None
) -> Tensor:
    """The output of every rank, (B, T, R, H, P), in float32."""
    mix = inputs.mix.float().sigmoid()
    own, previous = mix * inputs.dt, previous_weight(inputs.dt, mix, starts)
    y, _ = mimo_scan(
        inputs.x.float(),
        inputs.log_decay,
        write_weight(own, previous, None),
        own,
        inputs.B.float(),
        inputs.C.float(),
        B_bias,
        C_bias,
        angles(inputs.rate, inputs.dt, None, starts),
        mimo_x,
        D,
        starts=starts,
        adjacent=mimo_x is None,
    )
    return untiled(y, inputs.x.shape[1])


def siso_pair(
    draw: Draw, dtype: torch.dtype, sizes: Sizes, starts: Tensor | None
) -> tuple[tuple[Tensor], tuple[Tensor]]:
    """Of one rank, gated."""
    from hybridlm.ops.kernels.mamba3 import kernel_siso

    inputs = _inputs(draw, dtype, sizes, 1)
    B_bias, C_bias = (draw(sizes.heads, 1, sizes.d_state) for _ in range(2))
    D = draw(sizes.heads)
    assert inputs.z is not None
    mine = _scanned(inputs, B_bias, C_bias, D, None, starts).squeeze(2) * F.silu(inputs.z.float())
    return (mine,), (kernel_siso(inputs, B_bias, C_bias, D, starts),)


def mimo_pair(
    draw: Draw, dtype: torch.dtype, sizes: Sizes, starts: Tensor | None
) -> tuple[tuple[Tensor], tuple[Tensor]]:
    """Of several ranks, gated and joined."""
    from hybridlm.ops.kernels.mamba3 import kernel_mimo

    inputs, rank = _inputs(draw, dtype, sizes, sizes.rank), sizes.rank
    B_bias, C_bias = (draw(sizes.heads, rank, sizes.d_state) for _ in range(2))
    D = draw(sizes.heads)
    mimo_x, mimo_z, mimo_o = (draw(sizes.heads, rank, sizes.head_dim) for _ in range(3))
    assert inputs.z is not None
    y = _scanned(inputs, B_bias, C_bias, D, mimo_x, starts)
    z = inputs.z.float().unsqueeze(2) * mimo_z.transpose(0, 1)
    mine = (y * F.silu(z) * mimo_o.transpose(0, 1)).sum(2)
    return (mine,), (kernel_mimo(inputs, B_bias, C_bias, D, mimo_x, mimo_z, mimo_o, starts),)
