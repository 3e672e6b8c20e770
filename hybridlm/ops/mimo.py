"""Mamba-3's scan over R ranks (MIMO; Lahoti et al. 2026), rotation included, as matrix products over chunks with a
hand-written backward.

Per head, with k_{t,r} = Rot(theta_t) (B_{t,r} + B_bias_r), c_{t,r} likewise of C, and x_{t,r} = mimo_x_r * x_t:

    S_t     = exp(log_decay_t) S_{t-1} + scale_t sum_r x_{t,r} k_{t,r}^T                            S in R^(P x N)
    y_{t,r} = sum_{s<t} exp(sum log_decay_{s+1..t}) scale_s sum_r' (c_{t,r} . k_{s,r'}) x_{s,r'}
              + own_t sum_r' (c_{t,r} . k_{t,r'}) x_{t,r'} + D x_{t,r}

The rotated k and c are R heads x N numbers per token and cheaper to recompute than to save: they are computed head by
head inside the operator, and again in its backward, from B, C and the angles. The operator saves its inputs and the
states at chunk boundaries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridlm.ops.dispatch import autocast_off, called, differentiate
from hybridlm.ops.mimo_backward import mimo_scan_backward
from hybridlm.ops.mimo_tiles import Tiles, cut
from hybridlm.ops.norm import at_least_fp32


def _forward(tiles: Tiles, D: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """What ``_mimo_scan`` returns."""
    heads, _, rank, length, d_state, width, _ = tiles.sizes
    _, chunks, batch, _, _ = tiles.x.shape
    y = tiles.B.new_empty(heads, chunks, batch, rank, length, width)
    states = tiles.B.new_empty(heads, chunks + 1, batch, d_state, width)
    states[:, 0] = 0.0 if initial_state is None else initial_state.to(states.dtype).permute(1, 0, 3, 2)
    for block in tiles.blocks():
        _block(tiles.part(block), D.to(y.dtype), states[:, block.start : block.stop + 1], y[:, block])
    return y, states


def _block(tiles: Tiles, D: Tensor, states: Tensor, y: Tensor) -> None:
    """Fills y (H, chunks, B, R, Q, P) and all states (H, chunks + 1, B, N, P) but the first, which is there."""
    heads, K, rank, length, d_state, width, _ = tiles.sizes
    k = [tiles.turned(tiles.B, tiles.B_bias, h) for h in range(heads)]
    values = [tiles.values(h) for h in range(heads)]
    for h in range(heads):
        torch.bmm(k[h] * tiles.to_end[h], values[h], out=states[h, 1:].view(K, d_state, width))
    for i in range(tiles.x.shape[1]):
        states[:, i + 1].addcmul_(states[:, i], tiles.keep[:, i])
    for h in range(heads):
        c = tiles.turned(tiles.C, tiles.C_bias, h).transpose(1, 2)
        scores = torch.bmm(c, k[h])
        scores.view(K, rank, -1).mul_(tiles.for_ranks(tiles.weights(h)))
        scores.diagonal(dim1=1, dim2=2).add_(D[h])
        out = y[h].view(K, rank * length, width)
        torch.bmm(scores, values[h], out=out)
        out.addcmul_(torch.bmm(c, states[h, :-1].view(K, d_state, width)), tiles.from_start[h].transpose(1, 2))


@torch.library.custom_op("hybridlm::mimo_scan", mutates_args=())
def _mimo_scan(
    x: Tensor,
    log_decay: Tensor,
    scale: Tensor,
    own: Tensor,
    B: Tensor,
    C: Tensor,
    B_bias: Tensor,
    C_bias: Tensor,
    theta: Tensor | None,
    mimo_x: Tensor | None,
    D: Tensor,
    initial_state: Tensor | None,
    starts: Tensor | None,
    adjacent: bool,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Returns y in tiles (H, chunks, B, R, Q, P) and the states at the chunks' boundaries (H, chunks + 1, B, N, P);
    both wide."""
    with autocast_off(x):  # it would round the matrix products
        return _forward(
            cut(x, log_decay, scale, own, B, C, B_bias, C_bias, theta, mimo_x, starts, adjacent, chunk),
            D,
            initial_state,
        )


@_mimo_scan.register_fake
def _(x: Tensor, log_decay: Tensor, scale: Tensor, own: Tensor, B: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    batch, time, heads, width = x.shape
    chunk, wide = others[-1], at_least_fp32(x.dtype)
    chunks = -(-time // chunk)
    y = x.new_empty((heads, chunks, batch, B.shape[2], chunk, width), dtype=wide)
    return y, x.new_empty((heads, chunks + 1, batch, B.shape[4], width), dtype=wide)


differentiate(
    _mimo_scan,
    mimo_scan_backward,
    "y states",
    "x log_decay scale own B C B_bias C_bias D theta mimo_x initial_state",
    state=lambda grad: grad.permute(1, 0, 3, 2),
)


def mimo_scan(
    x: Tensor,
    log_decay: Tensor,
    scale: Tensor,
    own: Tensor,
    B: Tensor,
    C: Tensor,
    B_bias: Tensor,
    C_bias: Tensor,
    theta: Tensor | None,
    mimo_x: Tensor | None,
    D: Tensor,
    *,
    initial_state: Tensor | None = None,
    starts: Tensor | None = None,
    adjacent: bool = False,
    chunk: int = 16,
) -> tuple[Tensor, Tensor]:
    """The scan of the module's docstring. Returns y in tiles (see ``untiled``) and the final state (B, H, P, N), at
    least fp32.

    x: (B, T, H, P); log_decay (not positive), scale and own (not negative): (B, T, H); B, C: (B, T, R, G, N),
    normalised, head h reading group ``h // (H / G)``; B_bias, C_bias: (H, R, N); theta: (B, H, n, T) in radians, None:
    no rotation; mimo_x: (H, R, P), None: ones; D: (H,); initial_state: (B, H, P, N), zeros if None; starts: (B, T),
    True at a token before which everything is dropped, log_decay at that token included; None: nowhere. ``adjacent``:
    which channels make a pair, see ``mimo_tiles.pairs``. ``chunk`` changes speed, not results.
    """
    y, states = called(
        _mimo_scan,
        x,
        log_decay,
        scale,
        own,
        B,
        C,
        B_bias,
        C_bias,
        theta,
        mimo_x,
        D,
        initial_state,
        starts,
        adjacent,
        min(chunk, x.shape[1]),
    )
    return y, states[:, -1].permute(1, 0, 3, 2)


def untiled(y: Tensor, time: int) -> Tensor:
    """(H, chunks, B, R, Q, P) as the scan lays it out to (B, T, R, H, P)."""
    return y.permute(2, 1, 4, 3, 0, 5).flatten(1, 2)[:, :time]
