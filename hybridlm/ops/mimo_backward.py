"""The backward of Mamba-3's chunked scan (``mimo.py``): tiles are recomputed block by block and head by head.

As in ``ssd.py``, every pair of tokens s < t of a chunk gives the same amount to the gradient of the running sum c_t of
log_decay and, negative, of c_s; what a token reads of the incoming state gives to that of c_t, what it adds to the
outgoing state to those of the steps after it. A token's weight on itself and D, which have no decay in them, cannot
round into the gradient of the decays. The gradient of an angle is the area that a pair of channels spans with its
gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hybridlm.ops.dispatch import autocast_off
from hybridlm.ops.mimo_tiles import Tiles, cut, pairs, rotate_, rows_of, sum_of_ranks


@dataclass
class _Grads:
    """Gradients in the layout of ``Tiles``, filled block by block and head by head."""

    x: Tensor  # (B, chunks, Q, H, P)
    B: Tensor  # (G, K, N, R Q)
    C: Tensor  # (G, K, N, R Q)
    B_bias: Tensor  # (H, N, R)
    C_bias: Tensor  # (H, N, R)
    theta: Tensor  # (H, K, n, Q)
    mimo_x: Tensor  # (H, R, P)
    D: Tensor  # (H,)
    sums: Tensor  # (H, K, Q), of the running sum c_t
    reach: Tensor  # (H, K, Q)
    to_end: Tensor  # (H, K, Q), of its logarithm
    own: Tensor  # (H, K, Q)

    @staticmethod
    def like(tiles: Tiles) -> _Grads:
        heads, K, rank, length, d_state, width, _ = tiles.sizes
        _, chunks, batch, _, _ = tiles.x.shape
        new, zeros = tiles.decay.new_empty, tiles.decay.new_zeros
        angles = 0 if tiles.cos is None else tiles.cos.shape[2]
        wide = (tiles.B.shape[0], K, d_state, rank * length)
        return _Grads(
            x=new(batch, chunks, length, heads, width),
            B=zeros(wide),
            C=zeros(wide),
            B_bias=zeros(heads, d_state, rank),
            C_bias=zeros(heads, d_state, rank),
            theta=new(heads, K, angles, length),
            mimo_x=zeros(heads, 0 if tiles.mimo_x is None else rank, width),
            D=zeros(heads),
            sums=new(heads, K, length),
            reach=new(heads, K, length),
            to_end=new(heads, K, length),
            own=new(heads, K, length),
        )

    def part(self, chunks: slice) -> _Grads:
        """Those of some of the chunks; the parameters' are added to by all."""
        rows = rows_of(chunks, len(self.x))
        some = {name: getattr(self, name)[:, rows] for name in ("B", "C", "theta", "sums", "reach", "to_end", "own")}
        return replace(self, x=self.x[:, chunks], **some)


def _product_of_tokens(a: Tensor, b: Tensor) -> Tensor:
    """sum_(r, r') a_(r, t, r', s) b_(r, t, r', s): (K, Q, Q). a, b: (K, R, Q, R Q)."""
    K, rank, length, _ = a.shape
    total = a[:, 0] * b[:, 0]
    for r in range(1, rank):
        total.addcmul_(a[:, r], b[:, r])
    return total if rank == 1 else total.view(K, length, rank, length).sum(2)


def _own_tokens(
    tiles: Tiles, grads: _Grads, h: int, dy: Tensor, k: Tensor, c: Tensor, x: Tensor, skip: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of k, c (K, N, R Q) and x (K, R Q, P) through the products within each chunk."""
    _, K, rank, length, _, _, _ = tiles.sizes
    weights = tiles.weights(h)
    scores, dscores = torch.bmm(c.transpose(1, 2), k), torch.bmm(dy, x.transpose(1, 2))
    both = _product_of_tokens(scores.view(K, rank, length, -1), dscores.view(K, rank, length, -1))
    grads.own[h] = both.diagonal(dim1=1, dim2=2)
    grads.D[h] += dscores.diagonal(dim1=1, dim2=2).sum()
    both.mul_(weights).diagonal(dim1=1, dim2=2).zero_()  # what each pair of tokens gives to the loss
    grads.sums[h], grads.reach[h] = both.sum(2), both.sum(1)
    weights = tiles.for_ranks(weights)
    scores.view(K, rank, -1).mul_(weights)
    scores.diagonal(dim1=1, dim2=2).add_(skip)
    dscores.view(K, rank, -1).mul_(weights)
    return torch.bmm(c, dscores), torch.bmm(k, dscores.transpose(1, 2)), torch.bmm(scores.transpose(1, 2), dy)


def _turn_back(tiles: Tiles, grads: _Grads, h: int, k: Tensor, c: Tensor, dk: Tensor, dc: Tensor) -> None:
    """From the gradients of the rotated k and c of one head to those of angles, B, C and their biases; changes dk and
    dc."""
    _, K, rank, length, d_state, _, per_group = tiles.sizes
    if tiles.cos is not None:
        cos, sin = tiles.rotation(h)
        n = cos.shape[1]
        (ka, kb), (dka, dkb) = pairs(k, n, tiles.adjacent, 1), pairs(dk, n, tiles.adjacent, 1)
        (ca, cb), (dca, dcb) = pairs(c, n, tiles.adjacent, 1), pairs(dc, n, tiles.adjacent, 1)
        area = (ka * dkb).addcmul_(kb, dka, value=-1.0).addcmul_(ca, dcb).addcmul_(cb, dca, value=-1.0)
        grads.theta[h] = area.view(K, n, rank, length).sum(2)
        sin = sin.neg()
        rotate_(dk, cos, sin, adjacent=tiles.adjacent, dim=1)
        rotate_(dc, cos, sin, adjacent=tiles.adjacent, dim=1)
    grads.B[h // per_group] += dk
    grads.C[h // per_group] += dc
    grads.B_bias[h] += dk.sum(0).view(d_state, rank, length).sum(-1)
    grads.C_bias[h] += dc.sum(0).view(d_state, rank, length).sum(-1)


def _head(
    tiles: Tiles, grads: _Grads, h: int, dy: Tensor, c: Tensor, skip: Tensor, incoming: Tensor, doutgoing: Tensor
) -> None:
    """Everything of one head once the gradients of the states are known. dy: (K, R Q, P); incoming, doutgoing: (K, N,
    P)."""
    _, K, rank, length, _, width, _ = tiles.sizes
    k, x = tiles.turned(tiles.B, tiles.B_bias, h), tiles.values(h)
    dk, dc, dx = _own_tokens(tiles, grads, h, dy, k, c, x, skip)
    read = torch.bmm(incoming, dy.transpose(1, 2))  # what dc is of the incoming state, but for its weight
    dc.addcmul_(read, tiles.from_start[h])
    grads.sums[h] += (read.mul_(c).sum(1) * tiles.from_start[h, :, 0]).view(K, rank, length).sum(1)
    dk.addcmul_(torch.bmm(doutgoing, x.transpose(1, 2)), tiles.to_end[h])
    written = torch.bmm(k.transpose(1, 2), doutgoing)
    dx.addcmul_(written, tiles.to_end[h].transpose(1, 2))
    grads.to_end[h] = (written.mul_(x).sum(2) * tiles.to_end[h, :, 0]).view(K, rank, length).sum(1)

    dx = dx.view(*tiles.x.shape[1:3], rank, length, width)
    if tiles.mimo_x is None:
        grads.x[..., h, :] = (dx[:, :, 0] if rank == 1 else dx.sum(2)).transpose(0, 1)
    else:
        grads.x[..., h, :] = sum_of_ranks(dx, tiles.mimo_x[h]).transpose(0, 1)
        grads.mimo_x[h] += dx.mul_(tiles.x[h].unsqueeze(2)).sum((0, 1)).sum(1)
    _turn_back(tiles, grads, h, k, c, dk, dc)


@torch.library.custom_op("hybridlm::mimo_scan_backward", mutates_args=())
def mimo_scan_backward(
    dy: Tensor,
    dstates: Tensor | None,
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
    starts: Tensor | None,
    states: Tensor,
    adjacent: bool,
    chunk: int,
) -> list[Tensor]:
    """Gradients of x, log_decay, scale, own, B, C, the biases, D, theta, mimo_x (both empty without one) and the
    initial state (H, B, N, P)."""
    with autocast_off(x):  # it would round the matrix products
        tiles = cut(x, log_decay, scale, own, B, C, B_bias, C_bias, theta, mimo_x, starts, adjacent, chunk)
        tile_grads, dinitial = _backward(tiles, dy, dstates, D, states)
        grads = _as_inputs(tiles, tile_grads, x.shape[1])
    like = (
        x,
        log_decay,
        scale,
        own,
        B,
        C,
        B_bias,
        C_bias,
        D,
        x if theta is None else theta,
        x if mimo_x is None else mimo_x,
    )
    return [*(grad.to(tensor.dtype).contiguous() for grad, tensor in zip(grads, like, strict=True)), dinitial]


def _backward(tiles: Tiles, dy: Tensor, dstates: Tensor | None, D: Tensor, states: Tensor) -> tuple[_Grads, Tensor]:
    """Gradients in tiles, and that of the initial state."""
    grads, dchain = _Grads.like(tiles), torch.empty_like(states)
    dchain[:, -1] = 0.0 if dstates is None else dstates[:, -1]
    for block in reversed(tiles.blocks()):
        boundaries = slice(block.start, block.stop + 1)
        direct = None if dstates is None else dstates[:, block]
        _block(
            tiles.part(block),
            grads.part(block),
            dy[:, block],
            D.to(dy.dtype),
            states[:, boundaries],
            dchain[:, boundaries],
            direct,
        )
    return grads, dchain[:, 0].clone()


def _block(
    tiles: Tiles, grads: _Grads, dy: Tensor, D: Tensor, states: Tensor, dchain: Tensor, dstates: Tensor | None
) -> None:
    """Fills ``grads`` and dchain (H, chunks + 1, B, N, P), the gradients of the states, of which the last is there.

    dy: (H, chunks, B, R, Q, P); dstates: (H, chunks, B, N, P), what the chunks' first states are given from elsewhere.
    """
    heads, K, _, _, d_state, width, _ = tiles.sizes
    # Through the incoming states, then through the chain of states, last chunk first.
    c = [tiles.turned(tiles.C, tiles.C_bias, h) for h in range(heads)]
    dy = dy.flatten(1, 2).flatten(2, 3)
    for h in range(heads):
        torch.bmm(c[h] * tiles.from_start[h], dy[h], out=dchain[h, :-1].view(K, d_state, width))
    if dstates is not None:
        dchain[:, :-1] += dstates
    for i in reversed(range(tiles.x.shape[1])):
        dchain[:, i].addcmul_(dchain[:, i + 1], tiles.keep[:, i])
    for h in range(heads):
        incoming, doutgoing = states[h, :-1].view(K, d_state, width), dchain[h, 1:].view(K, d_state, width)
        _head(tiles, grads, h, dy[h], c[h], D[h], incoming, doutgoing)
        kept = torch.bmm(doutgoing.view(K, 1, -1), incoming.view(K, -1, 1)).view(K)
        grads.sums[h, :, -1].addcmul_(kept, tiles.keep[h].flatten())


def _as_inputs(tiles: Tiles, grads: _Grads, time: int) -> tuple[Tensor, ...]:
    """The gradients in the shapes of the inputs, those of theta and mimo_x last."""
    groups, _, d_state, rank, length = tiles.B.shape
    heads, chunks, batch, _, _ = tiles.x.shape

    def per_head(grad: Tensor) -> Tensor:  # (H, K, Q) to (B, T, H)
        return grad.reshape(heads, chunks, batch, length).permute(2, 1, 3, 0).flatten(1, 2)[:, :time]

    def states_last(grad: Tensor) -> Tensor:  # (G, K, N, R Q) to (B, T, R, G, N)
        return grad.view(groups, chunks, batch, d_state, rank, length).permute(2, 1, 5, 4, 0, 3).flatten(1, 2)[:, :time]

    return (
        grads.x.flatten(1, 2)[:, :time],
        per_head(tiles.to_steps(grads.sums - grads.reach, grads.to_end)),
        per_head((grads.reach + grads.to_end) / tiles.scale),
        per_head(grads.own),
        states_last(grads.B),
        states_last(grads.C),
        grads.B_bias.transpose(1, 2),
        grads.C_bias.transpose(1, 2),
        grads.D,
        grads.theta.unflatten(1, (chunks, batch)).permute(2, 0, 3, 1, 4).flatten(3)[..., :time],
        grads.mimo_x,
    )


@mimo_scan_backward.register_fake
def _(
    dy: Tensor,
    dstates: Tensor | None,
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
    starts: Tensor | None,
    states: Tensor,
    *others: Any,
) -> list[Tensor]:
    like = (x, log_decay, scale, own, B, C, B_bias, C_bias, D)
    grads = [tensor.new_empty(tensor.shape) for tensor in like]  # contiguous, as the real ones are
    angles = x.new_empty(x.shape[0], x.shape[2], 0, x.shape[1]) if theta is None else theta.new_empty(theta.shape)
    ranks = x.new_empty(x.shape[2], 0, x.shape[3]) if mimo_x is None else mimo_x.new_empty(mimo_x.shape)
    return [*grads, angles, ranks, states.new_empty(states[:, 0].shape)]
