"""Mamba-3's scans through mamba-ssm: the Triton kernel of one rank, the TileLang kernel of several.

Both turn, bias, mix and sum the angles themselves: they take the rates as in_proj gives them, before tanh and sigmoid.
Documents stand one behind the other in a single row for them, marked by where each begins.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hybridlm.ops.kernels.calls import outside_graphs
from hybridlm.ops.kernels.rules import mimo_chunk

SISO_CHUNK = 64  # tokens; mamba_ssm's recommendation


class Mamba3Inputs(NamedTuple):
    """T tokens before anything is turned; x, B, C and z in bfloat16 or wider, the others in at least float32."""

    x: Tensor  # (B, T, H, P)
    B: Tensor  # (B, T, R, G, N), normalised
    C: Tensor
    log_decay: Tensor  # (B, T, H)  A dt
    dt: Tensor  # (B, T, H)
    mix: Tensor  # (B, T, H), before the sigmoid
    rate: Tensor  # (B, T, n), before tanh
    z: Tensor | None  # (B, T, H, P) the gate; None: not gated here

    def in_one_row(self, starts: Tensor) -> tuple[Mamba3Inputs, Tensor]:
        """(1, B T, ...) of all, and where documents begin and end in it: (documents + 1,) int32. A row of the batch
        ends a document."""
        begins = starts.clone()
        begins[:, 0] = True
        edges = F.pad(begins.flatten().nonzero().squeeze(1), (0, 1), value=begins.numel()).to(torch.int32)

        def joined(tensor: Tensor) -> Tensor:
            return tensor.flatten(0, 1).unsqueeze(0)

        x, B, C, z = joined(self.x), joined(self.B), joined(self.C), None if self.z is None else joined(self.z)
        steps = (joined(self.log_decay), joined(self.dt), joined(self.mix), joined(self.rate))
        return Mamba3Inputs(x, B, C, *steps, z), edges


def _by_head(tensor: Tensor) -> Tensor:
    """(B, T, H) to (B, H, T), float32."""
    return tensor.float().transpose(1, 2).contiguous()


@outside_graphs
def kernel_siso(inputs: Mamba3Inputs, B_bias: Tensor, C_bias: Tensor, D: Tensor, starts: Tensor | None) -> Tensor:
    """y, gated by silu(z) where z is given: (B, T, H, P) in bfloat16. B_bias, C_bias: (H, 1, N); D: (H,); starts: (B,
    T) or None."""
    from mamba_ssm.ops.triton.mamba3.mamba3_siso_combined import mamba3_siso_combined

    batch, length = inputs.x.shape[:2]
    edges = None
    if starts is not None:
        inputs, edges = inputs.in_one_row(starts)
    heads = inputs.x.shape[2]
    y: Tensor = mamba3_siso_combined(
        Q=inputs.C.squeeze(2).contiguous(),
        K=inputs.B.squeeze(2).contiguous(),
        V=inputs.x.contiguous(),
        ADT=_by_head(inputs.log_decay),
        DT=_by_head(inputs.dt),
        Trap=inputs.mix.transpose(1, 2).contiguous(),
        Q_bias=C_bias.float().squeeze(1),
        K_bias=B_bias.float().squeeze(1),
        Angles=inputs.rate.float().unsqueeze(2).expand(-1, -1, heads, -1).contiguous(),
        D=D.float(),
        Z=None if inputs.z is None else inputs.z.contiguous(),
        Input_States=None,
        chunk_size=SISO_CHUNK,
        return_final_states=False,
        cu_seqlens=edges,
    )
    return y.reshape(batch, length, *y.shape[2:])


@outside_graphs
def kernel_mimo(
    inputs: Mamba3Inputs,
    B_bias: Tensor,
    C_bias: Tensor,
    D: Tensor,
    mimo_x: Tensor,
    mimo_z: Tensor,
    mimo_o: Tensor,
    starts: Tensor | None,
) -> Tensor:
    """``sum_r mimo_o_r * y_r * silu(mimo_z_r * z)``: (B, T, H, P) in bfloat16. B_bias, C_bias: (H, R, N); mimo_*: (H,
    R, P)."""
    from mamba_ssm.ops.tilelang.mamba3.mamba3_mimo import mamba3_mimo

    batch, length = inputs.x.shape[:2]
    edges = None
    if starts is not None:
        inputs, edges = inputs.in_one_row(starts)
    assert inputs.z is not None
    heads, rank, narrow = inputs.x.shape[2], inputs.B.shape[2], torch.bfloat16
    y: Tensor = mamba3_mimo(
        Q=inputs.C.to(narrow),
        K=inputs.B.to(narrow),
        V=inputs.x.to(narrow),
        ADT=_by_head(inputs.log_decay),
        DT=_by_head(inputs.dt),
        Trap=inputs.mix.to(narrow).transpose(1, 2),
        Q_bias=C_bias.float(),
        K_bias=B_bias.float(),
        MIMO_V=mimo_x.float(),
        MIMO_Z=mimo_z.float(),
        MIMO_Out=mimo_o.float(),
        Angles=inputs.rate.float().unsqueeze(2).expand(-1, -1, heads, -1),
        D=D.float(),
        Z=inputs.z.to(narrow),
        chunk_size=mimo_chunk(rank),
        rotary_dim_divisor=inputs.B.shape[4] // inputs.rate.shape[-1],
        dtype=narrow,
        return_state=False,
        cu_seqlens=edges,
    )
    return y.reshape(batch, length, *y.shape[2:])
