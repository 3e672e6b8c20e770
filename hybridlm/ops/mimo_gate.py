"""The output of Mamba-3's ranks: each is gated by its own projection of z, weighted and summed; hand-written backward.

Recorded by autograd, R d_inner numbers per token would be saved several times: the operator saves y and z, and
recomputes the gates in its backward, head by head in the layout of the scan.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hybridlm.ops.dispatch import autocast_off, called, differentiate, new_like
from hybridlm.ops.mimo_tiles import sum_of_ranks
from hybridlm.ops.norm import as_dtype
from hybridlm.ops.padding import in_chunks


def _tiled(tensor: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
    """(B, T, H, P) to (H, chunks, B, 1, Q, P), a view where it can be."""
    return in_chunks(tensor, chunk, dtype).permute(3, 1, 0, 2, 4).unsqueeze(3)


def _gated(y: Tensor, z: Tensor, mimo_z: Tensor, mimo_o: Tensor) -> Tensor:
    heads, chunks, batch, _, length, width = y.shape
    z_tiles = _tiled(z, length, y.dtype)
    in_weights, out_weights = mimo_z.to(y.dtype).unsqueeze(2), mimo_o.to(y.dtype).unsqueeze(2)  # (H, R, 1, P)
    out = y.new_empty(batch, chunks, length, heads, width)
    gated = torch.empty_like(y[0])
    for h in range(heads):
        torch.mul(z_tiles[h], in_weights[h], out=gated)
        F.silu(gated, inplace=True).mul_(y[h])
        out[..., h, :] = sum_of_ranks(gated, out_weights[h]).transpose(0, 1)
    return out.flatten(1, 2)[:, : z.shape[1]].contiguous()


@torch.library.custom_op("hybridlm::mimo_gate", mutates_args=())
def _mimo_gate(y: Tensor, z: Tensor, mimo_z: Tensor, mimo_o: Tensor) -> Tensor:
    with autocast_off(y):
        return _gated(y, z, mimo_z, mimo_o)


_mimo_gate.register_fake(lambda y, z, mimo_z, mimo_o: z.new_empty(z.shape, dtype=y.dtype))


def _gradients(
    dout: Tensor, y: Tensor, z: Tensor, mimo_z: Tensor, mimo_o: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of y, z, mimo_z and mimo_o."""
    heads, chunks, batch, _, length, width = y.shape
    z_tiles, dout_tiles = _tiled(z, length, y.dtype), _tiled(dout, length, y.dtype)
    in_weights, out_weights = mimo_z.to(y.dtype).unsqueeze(2), mimo_o.to(y.dtype).unsqueeze(2)
    dy, dz = torch.empty_like(y), y.new_empty(batch, chunks, length, heads, width)
    dmimo_z, dmimo_o = (y.new_empty(mimo_z.shape) for _ in range(2))
    projected, gates, through = (torch.empty_like(y[0]) for _ in range(3))
    for h in range(heads):
        torch.mul(z_tiles[h], in_weights[h], out=projected)
        torch.mul(torch.ops.aten.silu.out(projected, out=gates), dout_tiles[h], out=gates)
        torch.mul(gates, out_weights[h], out=dy[h])
        dmimo_o[h] = gates.mul_(y[h]).sum((0, 1)).sum(1)
        torch.mul(dout_tiles[h], y[h], out=through).mul_(out_weights[h])
        torch.ops.aten.silu_backward.grad_input(through, projected, grad_input=through)
        dz[..., h, :] = sum_of_ranks(through, in_weights[h]).transpose(0, 1)
        dmimo_z[h] = through.mul_(z_tiles[h]).sum((0, 1)).sum(1)
    dz = dz.flatten(1, 2)[:, : z.shape[1]].to(z.dtype).contiguous()
    return dy, dz, dmimo_z.to(mimo_z.dtype), dmimo_o.to(mimo_o.dtype)


@torch.library.custom_op("hybridlm::mimo_gate_backward", mutates_args=())
def _mimo_gate_backward(
    dout: Tensor, y: Tensor, z: Tensor, mimo_z: Tensor, mimo_o: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with autocast_off(y):
        return _gradients(dout, y, z, mimo_z, mimo_o)


_mimo_gate_backward.register_fake(lambda dout, *inputs: tuple(new_like(*inputs)))


differentiate(_mimo_gate, _mimo_gate_backward, "out", "y z mimo_z mimo_o")


def mimo_gate(y: Tensor, z: Tensor, mimo_z: Tensor, mimo_o: Tensor) -> Tensor:
    """``sum_r mimo_o_r * y_r * silu(mimo_z_r * z)``: (B, T, H, P), y's dtype.

    y: (H, chunks, B, R, Q, P), as ``mimo_scan`` returns it, at least fp32; z: (B, T, H, P); mimo_z, mimo_o: (H, R, P).
    """
    out: Tensor = called(_mimo_gate, y.contiguous(), z, mimo_z, mimo_o)
    return out


def mimo_gate_step(y: Tensor, z: Tensor, mimo_z: Tensor, mimo_o: Tensor) -> Tensor:
    """``mimo_gate`` of one token, (B, H, P). y: (B, R, H, P), at least fp32; z: (B, H, P)."""
    in_weights, out_weights = (
        as_dtype(mimo_z, y.dtype).transpose(0, 1),
        as_dtype(mimo_o, y.dtype).transpose(0, 1),
    )  # (R, H, P)
    gates = F.silu(as_dtype(z, y.dtype).unsqueeze(1) * in_weights)
    return (y * gates).mul(out_weights).sum(1)
