"""What the tokens of a chunk give to each other in the gated delta rule (``ops.delta``), forward and backward.

With the logarithms g of the decays to base 2, a number for each token or one for each of its channels d, and j < t:

    A_tj = sum_d k_td k_jd 2^(g_{j+1,d} + ... + g_td)        P_tj = sum_d q_td k_jd 2^(g_{j+1,d} + ... + g_td)

and P_tt = sum_d q_td k_td.

One decay for all channels makes one weight for a pair of tokens. A decay for each channel does not, and pairs are too
many to weigh channel by channel: the chunk is halved again and again, and tokens j < t of two neighbouring halves meet
at the border between them, k_j weighed by what decays up to the border and k_t, q_t by what decays behind it. No
exponent is ever positive, so nothing overflows, and none is the difference of two longer sums, so a strong decay leaves
no rounding in the tokens behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Pairs(NamedTuple):
    """A and P, and the weights that they were made with."""

    tiles: Tensor  # (N, 2, C, C)  A, zero but for j < t, then P, zero but for j <= t
    weights: Tensor | None  # (N, C, C)  of a pair; None with a decay for each channel
    upto: Tensor  # (N, C, d)  2^(g_1 + ... + g_t)
    behind: Tensor  # (N, C, d)  2^(g_{t+1} + ... + g_C)


def pairs(kq: Tensor, steps: Tensor, same: Tensor | None) -> Pairs:
    """Of keys and queries kq (N, 2, C, Dk) and steps g (N, C, d), d = 1 or Dk; same (N, C, C): one where j <= t belong
    together."""
    if steps.shape[2] > 1:
        tiles, upto, behind = _by_channel(kq, steps)
        tiles = tiles if same is None else tiles.mul_(same.unsqueeze(1))
        tiles[:, 1].diagonal(dim1=1, dim2=2).copy_((kq[:, 0] * kq[:, 1]).sum(-1))
        return Pairs(tiles, None, upto, behind)
    strict = steps.new_ones(steps.shape[1], steps.shape[1]).tril_(-1)
    sums = (steps * strict).cumsum(1)  # of each pair's own steps
    upto, behind = (sums[:, :, :1] + steps[:, :1]).exp2_(), sums[:, -1].unsqueeze(-1).exp2()
    weights = sums.exp2_().mul_(strict if same is None else strict * same)
    tiles = torch.bmm(kq.flatten(1, 2), kq[:, 0].transpose(1, 2)).view(*kq.shape[:3], -1)
    itself = tiles[:, 1].diagonal(dim1=1, dim2=2).clone()
    tiles.mul_(weights.unsqueeze(1))[:, 1].diagonal(dim1=1, dim2=2).copy_(itself)
    return Pairs(tiles, weights, upto, behind)


def pairs_backward(
    dtiles: Tensor, kq: Tensor, steps: Tensor, same: Tensor | None, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradient of kq as t (N, 2, C, Dk) and that of the keys as j (N, C, Dk). dtiles is read for j < t, and
    overwritten."""
    if weights is None:
        return _by_channel_backward(dtiles if same is None else dtiles.mul_(same.unsqueeze(1)), kq, steps)
    both = dtiles.mul_(weights.unsqueeze(1)).flatten(1, 2)
    return torch.bmm(both, kq[:, 0]).view(kq.shape), torch.bmm(both.transpose(1, 2), kq.flatten(1, 2))


class Level(NamedTuple):
    """A chunk as n pairs of neighbouring blocks of ``size`` tokens."""

    size: int
    behind: Tensor  # (N, C, d)  sum of the steps behind t in t's block
    upto: Tensor  # (N, C, d)  sum of the steps of t's block up to t's own

    def meeting(self, kq: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys and queries of the second blocks (N n, 2 size, Dk) and keys of the first (N n, size, Dk) as they meet at
        the borders, and what they are weighed by for that (N, n, size, Dk)."""
        from_border, to_border = (
            halves(self.upto, self.size)[:, :, 1].exp2(),
            halves(self.behind, self.size)[:, :, 0].exp2(),
        )
        blocks = halves(kq, self.size)
        late, early = blocks[:, :, :, 1].transpose(1, 2) * from_border.unsqueeze(2), blocks[:, 0, :, 0] * to_border
        return late.flatten(0, 1).flatten(1, 2), early.flatten(0, 1), from_border, to_border


def halves(tensor: Tensor, size: int) -> Tensor:
    """(..., C, d) to (..., n, 2, size, d)."""
    return tensor.view(*tensor.shape[:-2], -1, 2, size, tensor.shape[-1])


def corners(tile: Tensor, size: int) -> Tensor:
    """What the second block of every pair reads of the first, of (N, ..., C, C): a view (N, n, ..., size, size)."""
    n = tile.shape[-1] // (2 * size)
    blocks = tile.view(*tile.shape[:-2], n, 2, size, n, 2, size)
    return blocks[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, 1)


def _levels(steps: Tensor) -> Iterator[Level]:
    """From blocks of one token to the whole chunk. The sums of one level become those of the next in place."""
    size, behind, upto = 1, torch.zeros_like(steps), steps.clone()
    yield Level(size, behind, upto)
    while size < steps.shape[1]:
        after, before = halves(behind, size), halves(upto, size)
        after[:, :, 0] += before[:, :, 1, -1:]
        before[:, :, 1] += before[:, :, 0, -1:]
        size *= 2
        yield Level(size, behind, upto)


def _by_channel(kq: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tiles = kq.new_zeros(*kq.shape[:3], kq.shape[2])
    for level in _levels(steps):
        if level.size < kq.shape[2]:
            late, early, _, _ = level.meeting(kq)
            met = torch.bmm(late, early.transpose(1, 2))
            corners(tiles, level.size).copy_(met.view(len(kq), -1, 2, level.size, level.size))
    return tiles, level.upto.exp2_(), level.behind.exp2_()


def _by_channel_backward(dtiles: Tensor, kq: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    up, down = torch.zeros_like(kq), torch.zeros_like(kq[:, 0])
    for level in _levels(steps):
        if level.size < kq.shape[2]:
            late, early, from_border, to_border = level.meeting(kq)
            met = corners(dtiles, level.size).reshape(len(late), -1, level.size)
            dlate = halves(up, level.size)[:, :, :, 1].transpose(1, 2)
            up_to_border = met * early if level.size == 1 else torch.bmm(met, early)
            dlate.addcmul_(up_to_border.view(dlate.shape), from_border.unsqueeze(2))
            dearly = torch.bmm(met.transpose(1, 2), late).view(to_border.shape)
            halves(down, level.size)[:, :, 0].addcmul_(dearly, to_border)
    return up, down
