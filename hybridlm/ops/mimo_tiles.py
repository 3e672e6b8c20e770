"""Mamba-3's inputs cut into chunks: what the chunked scan (``mimo.py``) and its backward (``mimo_backward.py``) both
start from.

Everything is laid out head by head, then chunk by chunk: a head's chunks of all rows form one batch of matrices, K =
chunks x batch. B and C stand with the state channels first, (K, N, R Q), because a rotation then combines whole rows of
memory, whichever channels make a pair; each matrix product takes them as they are.

A chunk of Q tokens and R ranks is one product of (R Q) x (R Q), rows and columns counted rank by rank. Its weights do
not depend on the ranks, so they are made for Q x Q and repeated. A long sequence is processed in blocks of chunks, so
that the products of one head stay in cache.

Logarithms and powers are to base 2, as in ``ssd_chunks.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from hybridlm.ops.norm import at_least_fp32
from hybridlm.ops.padding import in_chunks

TINY = 1e-30  # scale is taken to be at least this: its logarithm is needed; where it is 0, at padding, x is 0 too
_BLOCK = 1 << 18  # numbers in one head's products of a block, at most, if it holds more than one chunk of each row
# exponents above the diagonal may be large before masking: clamped, so that no product becomes NaN
_CAP = 30.0


def pairs(tensor: Tensor, n_angles: int, adjacent: bool, dim: int) -> tuple[Tensor, Tensor]:
    """The two channels of every pair that rotates, as views: (2i, 2i + 1) if ``adjacent``, else (i, i + N / 2), for i <
    n_angles."""
    if adjacent:
        both = tensor.narrow(dim, 0, 2 * n_angles).unflatten(dim, (n_angles, 2))
        inner = dim + 1 if dim >= 0 else dim
        return both.select(inner, 0), both.select(inner, 1)
    return tensor.narrow(dim, 0, n_angles), tensor.narrow(dim, tensor.shape[dim] // 2, n_angles)


def rotate_(tensor: Tensor, cos: Tensor, sin: Tensor, *, adjacent: bool, dim: int) -> Tensor:
    """Turns the pairs along ``dim`` by the angle, in place: (a, b) becomes (a cos - b sin, a sin + b cos)."""
    a, b = pairs(tensor, cos.shape[dim], adjacent, dim)
    turned = (a * cos).addcmul_(b, sin, value=-1.0)
    b.mul_(cos).addcmul_(a, sin)
    a.copy_(turned)
    return tensor


def sum_of_ranks(tensor: Tensor, weights: Tensor) -> Tensor:
    """sum_r weights_r * tensor_r: (chunks, B, Q, P). tensor: (chunks, B, R, Q, P); weights: (R, 1, P)."""
    out: Tensor = tensor[:, :, 0] * weights[0]
    for r in range(1, tensor.shape[2]):
        out.addcmul_(tensor[:, :, r], weights[r])
    return out


def repeated(tensor: Tensor, times: int) -> Tensor:
    """``times`` copies side by side along the last axis."""
    return tensor if times == 1 else torch.cat([tensor] * times, -1)


def rows_of(chunks: slice, batch: int) -> slice:
    """The places of these chunks of all rows among K = chunks x B."""
    return slice(chunks.start * batch, chunks.stop * batch)


@dataclass
class Tiles:
    """What both directions need, in the wide dtype. K = chunks x B, chunks first; c is the running sum of log_decay to
    base 2, from the first token of the chunk or document on."""

    x: Tensor  # (H, chunks, B, Q, P), a view
    B: Tensor  # (G, K, N, R, Q)
    C: Tensor  # (G, K, N, R, Q)
    B_bias: Tensor  # (H, N, R, 1)
    C_bias: Tensor  # (H, N, R, 1)
    decay: Tensor  # (H, K, Q)  c_t
    reach: Tensor  # (H, K, Q)  log2(scale_s) - c_s
    scale: Tensor  # (H, K, Q)
    own: Tensor  # (H, K, Q)  a token's weight on itself
    from_start: Tensor  # (H, K, 1, R Q)  2^c_t: weight of the incoming state; 0 from a document's start on
    to_end: (
        Tensor  # (H, K, 1, R Q)  2^(c_Q - c_s) scale_s: weight in the outgoing state; 0 where a document starts after s
    )
    # (H, chunks, B, 1, 1)  2^c_Q: what is left of the incoming state; 0 where a document starts in the chunk
    keep: Tensor
    past: Tensor | None  # (K, Q, Q)  1 where s < t are of one document, else 0; None: one document
    began: Tensor | None  # (K, Q)  True where a document starts
    cos: Tensor | None  # (H, K, n, Q)
    sin: Tensor | None
    mimo_x: Tensor | None  # (H, R, 1, P); None: ones
    adjacent: bool

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int, int]:
        """H, K, R, Q, N, P and heads per group."""
        heads, chunks, batch, length, width = self.x.shape
        groups, _, d_state, rank, _ = self.B.shape
        return heads, chunks * batch, rank, length, d_state, width, heads // groups

    def blocks(self) -> list[slice]:
        """All chunks, a few at a time in the order of time."""
        _, chunks, batch, length, _ = self.x.shape
        each = max(1, _BLOCK // (batch * (self.B.shape[3] * length) ** 2))
        return [slice(first, min(first + each, chunks)) for first in range(0, chunks, each)]

    def part(self, chunks: slice) -> Tiles:
        """Those of some of the chunks."""
        rows = rows_of(chunks, self.x.shape[2])
        per_head = ("B", "C", "decay", "reach", "scale", "own", "from_start", "to_end", "cos", "sin")
        some = {name: None if (tensor := getattr(self, name)) is None else tensor[:, rows] for name in per_head}
        past, began = (None if tensor is None else tensor[rows] for tensor in (self.past, self.began))
        return replace(self, x=self.x[:, chunks], keep=self.keep[:, chunks], past=past, began=began, **some)  # type: ignore[arg-type]

    def turned(self, which: Tensor, bias: Tensor, head: int) -> Tensor:
        """B or C of one head, with its bias and rotated: (K, N, R Q)."""
        _, K, rank, length, d_state, _, per_group = self.sizes
        wide = bias[head].expand(d_state, rank, length).reshape(d_state, rank * length)
        biased = which[head // per_group].view(K, d_state, rank * length) + wide
        if self.cos is None:
            return biased
        return rotate_(biased, *self.rotation(head), adjacent=self.adjacent, dim=1)

    def rotation(self, head: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of one head, repeated for the ranks: (K, n, R Q)."""
        assert self.cos is not None
        assert self.sin is not None
        rank = self.B.shape[3]
        return repeated(self.cos[head], rank), repeated(self.sin[head], rank)

    def values(self, head: int) -> Tensor:
        """x of one head as each rank sees it: (K, R Q, P)."""
        _, K, rank, length, _, width, _ = self.sizes
        x = self.x[head].unsqueeze(2)
        if self.mimo_x is None:
            return x.expand(-1, -1, rank, -1, -1).reshape(K, rank * length, width)
        out = torch.empty(*x.shape[:2], rank, length, width, dtype=x.dtype, device=x.device)
        return torch.mul(x, self.mimo_x[head], out=out).view(K, rank * length, width)

    def weights(self, head: int) -> Tensor:
        """2^(c_t - c_s) scale_s for s < t of one document, a token's own weight on the diagonal, else 0: (K, Q, Q) of
        one head."""
        weights = self.decay[head].unsqueeze(2) + self.reach[head].unsqueeze(1)
        weights = weights.clamp_max_(_CAP).exp2_()
        weights = weights.tril_(-1) if self.past is None else weights.mul_(self.past)
        weights.diagonal(dim1=1, dim2=2).copy_(self.own[head])
        return weights

    def for_ranks(self, weights: Tensor) -> Tensor:
        """``weights`` with the columns repeated for the ranks, to be multiplied with tiles (K, R, Q R Q): (K, 1, Q R
        Q)."""
        K, length, _ = weights.shape
        rank = self.B.shape[3]
        return repeated(weights, rank).view(K, 1, length * rank * length)

    def to_steps(self, dsums: Tensor, dto_end: Tensor) -> Tensor:
        """Gradient of log_decay from those of its running sums and of log(to_end); all (H, K, Q)."""
        if self.past is None or self.began is None:
            return dsums.flip(-1).cumsum(-1).flip(-1).add_(F.pad(dto_end[..., :-1], (1, 0)).cumsum(-1))
        by_chunk, to_end = dsums.transpose(0, 1), dto_end.transpose(0, 1)
        steps = torch.bmm(by_chunk, self.past).add_(by_chunk).add_(torch.bmm(to_end, self.past.transpose(1, 2)))
        return steps.masked_fill_(self.began.unsqueeze(1), 0.0).transpose(0, 1)


def _decays(steps: Tensor, past: Tensor | None, began: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Running sums c_t, 2^c_t where no document has started, and 2^(c_Q - c_t) where none will, else 0. steps: (H, K,
    Q)."""
    if past is None or began is None:
        sums = steps.cumsum(-1)
        return sums, sums.exp2(), (sums[..., -1:] - sums).exp2_()
    # A sum of each document's own steps: as the difference of two longer sums it would carry the rounding of other
    # documents.
    by_chunk = steps.masked_fill(began, 0.0).transpose(0, 1)
    sums = torch.bmm(by_chunk, past.transpose(1, 2)).add_(by_chunk).transpose(0, 1).contiguous()
    document = began.cumsum(-1)
    from_start = sums.masked_fill(document > 0, -torch.inf).exp2_()
    return sums, from_start, (sums[..., -1:] - sums).masked_fill_(document < document[:, -1:], -torch.inf).exp2_()


def cut(
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
    starts: Tensor | None,
    adjacent: bool,
    chunk: int,
) -> Tiles:
    """The tiles of a scan; shapes as in ``mimo_scan``."""
    dtype = at_least_fp32(x.dtype)
    heads = x.shape[2]

    def per_head(tensor: Tensor) -> Tensor:  # (B, T, H) to (H, K, Q)
        return in_chunks(tensor, chunk, dtype).permute(3, 1, 0, 2).flatten(1, 2)

    def states_first(tensor: Tensor) -> Tensor:  # (B, T, R, G, N) to (G, K, N, R, Q)
        return in_chunks(tensor, chunk, dtype).permute(4, 1, 0, 5, 3, 2).contiguous().flatten(1, 2)

    steps, scale, own = per_head(log_decay) * math.log2(math.e), per_head(scale).clamp_min(TINY), per_head(own)
    past = began = None
    if starts is not None:
        began = in_chunks(starts, chunk, torch.bool).transpose(0, 1).flatten(0, 1)  # (K, Q)
        document = began.cumsum(-1)  # counted within the chunk
        past = (document.unsqueeze(2) == document.unsqueeze(1)).to(dtype).tril_(-1)
    decay, from_start, to_end = _decays(steps, past, began)
    cos = sin = None
    if theta is not None:  # (B, H, n, T) to (H, K, n, Q)
        pad = -theta.shape[-1] % chunk
        angles = F.pad(theta.to(dtype), (0, pad)).unflatten(-1, (-1, chunk)).permute(1, 3, 0, 2, 4).flatten(1, 2)
        cos, sin = angles.cos(), angles.sin()
    return Tiles(
        x=in_chunks(x, chunk, dtype).permute(3, 1, 0, 2, 4),
        B=states_first(B),
        C=states_first(C),
        B_bias=B_bias.to(dtype).transpose(1, 2).unsqueeze(-1),
        C_bias=C_bias.to(dtype).transpose(1, 2).unsqueeze(-1),
        decay=decay,
        reach=scale.log2() - decay,
        scale=scale,
        own=own,
        from_start=repeated(from_start.unsqueeze(2), B.shape[2]),
        to_end=repeated(to_end.mul_(scale).unsqueeze(2), B.shape[2]),
        keep=from_start[..., -1].view(heads, -1, len(x), 1, 1),
        past=past,
        began=began,
        cos=cos,
        sin=sin,
        mimo_x=None if mimo_x is None else mimo_x.to(dtype).unsqueeze(2),
        adjacent=adjacent,
    )
