"""The gated delta rule in ``ops.delta``, which see, as matrix products over chunks: inputs cut into chunks, and
forward, on plain tensors.

With A and P of ``delta_pairs.py``, G_t the sum of log_decay in the chunk up to t, and S
the incoming state:

    (I + diag(beta) A) delta = diag(beta) (V - (K * exp(G)) S)
    O = (Q * exp(G)) S + P delta        S' = exp(G_C) S + (K * exp(G_C - G))^T delta

Only S goes from chunk to chunk. Powers are to base 2, as in ``ssd_chunks.py``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hybridlm.ops.delta_pairs import pairs
from hybridlm.ops.norm import at_least_fp32
from hybridlm.ops.padding import in_chunks

EPS = 1e-6  # added to the sum of squares of a key or query before the root


class Inputs(NamedTuple):
    """As in ``ops.delta.gated_delta``, or a part of them."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    beta: Tensor
    starts: Tensor | None

    def part(self, rows: slice, tokens: slice) -> Inputs:
        q, k, v, log_decay, beta, starts = (None if tensor is None else tensor[rows, tokens] for tensor in self)
        return Inputs(q, k, v, log_decay, beta, starts)  # type: ignore[arg-type]


class Chunks(NamedTuple):
    """Inputs cut into chunks of C tokens. M = B x H, N = chunks x M, chunks first; d = 1, or Dk with a decay per
    channel; all wide."""

    kq: Tensor  # (N, 2, C, Dk)  unit keys, and unit queries times Dk^-1/2
    lengths: Tensor  # (chunks, B, Hk, 2, C, 1)  what keys and queries were multiplied by for that
    v: Tensor  # (N, C, Dv)
    beta: Tensor  # (N, C, 1)
    steps: Tensor  # (N, C, d)  log_decay to base 2; zero where a document starts
    same: (
        Tensor | None
    )  # (N, C, C)  one where j <= t are of one document, else zero; None: documents are not told apart
    began: Tensor | None  # (N, C, 1)  True where a document starts
    rows: int  # M

    def each(self) -> list[slice]:
        """The places of each chunk among the N."""
        return [slice(first, first + self.rows) for first in range(0, len(self.v), self.rows)]


def heads_first(tensor: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
    """(B, T, H, ...) to (chunks, B, H, C, ...), a view where it can be."""
    return in_chunks(tensor, chunk, dtype).transpose(0, 1).transpose(2, 3)


def cut(inputs: Inputs, chunk: int) -> Chunks:
    q, k, v, log_decay, beta, starts = inputs
    wide, heads = at_least_fp32(v.dtype), v.shape[2]
    kq = torch.stack([heads_first(k, chunk, wide), heads_first(q, chunk, wide)], 3)
    lengths = torch.linalg.vector_norm(kq, dim=-1, keepdim=True).square_().add_(EPS).rsqrt_()
    lengths[:, :, :, 1].mul_(k.shape[3] ** -0.5)
    kq *= lengths
    if heads > k.shape[2]:
        kq = kq.repeat_interleave(heads // k.shape[2], 2)
    steps = heads_first(log_decay if log_decay.dim() == 4 else log_decay.unsqueeze(-1), chunk, wide) * math.log2(math.e)
    steps, same, began = steps.flatten(0, 2), None, None
    if starts is not None:
        began = heads_first(starts.unsqueeze(2), chunk, torch.bool).unsqueeze(-1).expand(-1, -1, heads, -1, -1)
        document = began[:, :, :1].cumsum(3)  # counted within the chunk
        same = (document == document.transpose(3, 4)).to(wide).tril_().expand(-1, -1, heads, -1, -1).flatten(0, 2)
        began = began.flatten(0, 2)
        steps.masked_fill_(began, 0.0)
    v, beta = (heads_first(tensor, chunk, wide).flatten(0, 2) for tensor in (v, beta.unsqueeze(-1)))
    return Chunks(kq.flatten(0, 2), lengths, v, beta, steps, same, began, len(inputs.v) * heads)


class Tiles(NamedTuple):
    """How the tokens of each chunk and the states at its two ends reach each other. Computed in either direction."""

    A: Tensor  # (N, C, C)  zero but for j < t
    P: Tensor  # (N, C, C)  zero but for j <= t
    weights: Tensor | None  # of ``Pairs``
    inverse: Tensor  # (N, C, C)  of I + diag(beta) A
    carry: Tensor  # (N, C, d)  exp(G_t): the incoming state at t; zero once a document has started
    to_end: Tensor  # (N, C, d)  exp(G_C - G_t): a token in the outgoing state; zero before the last start


def tiles_of(chunks: Chunks) -> Tiles:
    tiles, weights, carry, to_end = pairs(chunks.kq, chunks.steps, chunks.same)
    if chunks.same is not None and chunks.began is not None:
        carry.masked_fill_(chunks.began.cumsum(1) > 0, 0.0)
        to_end *= chunks.same[:, -1].unsqueeze(-1)
    A, P = tiles.unbind(1)
    eye = torch.eye(A.shape[1], dtype=A.dtype, device=A.device).expand_as(A)
    inverse = torch.linalg.solve_triangular(A * chunks.beta, eye, upper=False, left=False, unitriangular=True)
    return Tiles(A, P, weights, inverse, carry, to_end)


def forward(chunks: Chunks, states: list[Tensor]) -> Tensor:
    """Returns o (N, C, Dv). states: (M, Dk, Dv), the one that comes into the first chunk, then one of each chunk to be
    filled."""
    tiles, chunk = tiles_of(chunks), chunks.v.shape[1]
    write = tiles.inverse.mul_(chunks.beta.transpose(1, 2))
    reading = (chunks.kq * tiles.carry.unsqueeze(1)).flatten(1, 2)  # (N, 2 C, Dk)
    writing = (chunks.kq[:, 0] * tiles.to_end).transpose(1, 2)
    keep, o = tiles.carry[:, -1].unsqueeze(-1), torch.empty_like(chunks.v)
    for part, state, outgoing in zip(chunks.each(), states, states[1:], strict=False):
        read = torch.bmm(reading[part], state)
        delta = torch.bmm(write[part], chunks.v[part] - read[:, :chunk])
        torch.baddbmm(read[:, chunk:], tiles.P[part], delta, out=o[part])
        torch.mul(state, keep[part], out=outgoing).baddbmm_(writing[part], delta)
    return o
