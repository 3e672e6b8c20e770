"""What the tokens of a chunk give to each other in the gated delta rule (``ops.delta``), forward and backward.

With G_t the running sum of log_decay, a number or one for each channel d, and for keys and queries alike:

    A_tj = sum_d k_td k_jd exp(G_td - G_jd)        P_tj = sum_d q_td k_jd exp(G_td - G_jd)        j < t

A chunk is halved again and again, and tokens j < t of two neighbouring halves meet at the border between them: the exponent is the sum of
the steps behind j up to the border and that of the steps from there up to t. Neither is ever positive, so nothing overflows, and neither
is a difference of two longer sums, so a strong decay leaves no rounding in the tokens behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Level(NamedTuple):
    """A chunk as pairs of neighbouring blocks of ``size`` tokens. n pairs; d as in ``log_decay``: 1 or Dk."""

    size: int
    after: Tensor  # (N, C, d)  sum of the steps behind t in t's block
    upto: Tensor  # (N, C, d)  sum of the steps of t's block up to t's own

    def to_border(self) -> Tensor:
        """Weights with which the first blocks reach the borders: (N, n, size, d)."""
        return halves(self.after, self.size)[:, :, 0].exp2()

    def from_border(self) -> Tensor:
        """Weights with which the borders reach the second blocks: (N, n, size, d)."""
        return halves(self.upto, self.size)[:, :, 1].exp2()


def halves(tensor: Tensor, size: int) -> Tensor:
    """(..., C, d) to (..., n, 2, size, d)."""
    return tensor.unflatten(-2, (-1, 2, size))


def corners(tile: Tensor, size: int) -> Tensor:
    """What the second block of every pair reads of the first, of (N, ..., C, C): a view (N, n, ..., size, size)."""
    blocks = tile.unflatten(-2, (-1, 2, size)).unflatten(-1, (-1, 2, size))
    return blocks[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, 1)


def levels(steps: Tensor) -> Iterator[Level]:
    """From blocks of one token to the whole chunk. The sums of one level become those of the next in place."""
    size, chunk = 1, steps.shape[1]
    after, upto = torch.zeros_like(steps), steps.clone()
    yield Level(size, after, upto)
    while size < chunk:
        behind, before = halves(after, size), halves(upto, size)
        behind[:, :, 0] += before[:, :, 1, -1:]
        before[:, :, 1] += before[:, :, 0, -1:]
        size *= 2
        yield Level(size, after, upto)


def weights(steps: Tensor) -> tuple[Tensor, Level]:
    """exp(G_t - G_j) for j < t, else 0: (N, C, C) from steps (N, C, 1); and the whole chunk."""
    chunk = steps.shape[1]
    tile = steps.new_zeros(*steps.shape[:2], chunk)
    for level in levels(steps):
        if level.size < chunk:
            corners(tile, level.size).copy_(level.from_border() * level.to_border().transpose(2, 3))
    return tile, level


def products(kq: Tensor, tile: Tensor) -> Tensor:
    """A and P, (N, 2, C, C), of keys and queries kq (N, 2, C, Dk) with the ``weights`` of one decay for all channels."""
    return torch.bmm(kq.flatten(1, 2), kq[:, 0].transpose(1, 2)).view(*kq.shape[:3], -1).mul_(tile.unsqueeze(1))


def products_backward(dtiles: Tensor, kq: Tensor, tile: Tensor) -> tuple[Tensor, Tensor]:
    """From the gradient of A and P that of kq as t (N, 2, C, Dk) and that of the keys as j (N, C, Dk)."""
    both = (dtiles * tile.unsqueeze(1)).flatten(1, 2)
    return torch.bmm(both, kq[:, 0]).view(kq.shape), torch.bmm(both.transpose(1, 2), kq.flatten(1, 2))


def _meeting(kq: Tensor, level: Level) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and queries of the second blocks (N n, 2 size, Dk), keys of the first (N n, size, Dk), both brought to the borders, and with
    which weights: (N, n, size, Dk)."""
    from_border, to_border = level.from_border(), level.to_border()
    blocks = halves(kq, level.size)
    late = blocks[:, :, :, 1].transpose(1, 2) * from_border.unsqueeze(2)
    early = blocks[:, 0, :, 0] * to_border
    return late.flatten(0, 1).flatten(1, 2), early.flatten(0, 1), from_border, to_border


def channel_products(kq: Tensor, steps: Tensor) -> tuple[Tensor, Level]:
    """A and P where every channel has its decay, steps (N, C, Dk); and the whole chunk."""
    N, _, chunk, _ = kq.shape
    tiles = kq.new_zeros(N, 2, chunk, chunk)
    for level in levels(steps):
        if level.size < chunk:
            late, early, _, _ = _meeting(kq, level)
            met = torch.bmm(late, early.transpose(1, 2))
            corners(tiles, level.size).copy_(met.view(N, -1, 2, level.size, level.size))
    return tiles, level


def channel_products_backward(dtiles: Tensor, kq: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """As ``products_backward``; of dtiles only j < t is read."""
    up, down = torch.zeros_like(kq), torch.zeros_like(kq[:, 0])
    for level in levels(steps):
        if level.size < kq.shape[2]:
            late, early, from_border, to_border = _meeting(kq, level)
            met = corners(dtiles, level.size).reshape(len(late), -1, level.size)
            shape = from_border.shape
            blocks = halves(up, level.size)[:, :, :, 1].transpose(1, 2)
            blocks.addcmul_(torch.bmm(met, early).view(blocks.shape), from_border.unsqueeze(2))
            halves(down, level.size)[:, :, 0].addcmul_(torch.bmm(met.transpose(1, 2), late).view(shape), to_border)
    return up, down
