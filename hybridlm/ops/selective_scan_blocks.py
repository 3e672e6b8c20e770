"""The loops of ops/selective_scan.py, forward and backward, over blocks of the sequence.

A block is k = r c chunks of Q positions: ``c`` successive chunks of each of ``r`` rows. One step of a loop advances all
of them by a position; k is large enough that a step outweighs its dispatch, and small enough that the block's decays
(Q, k, N, E), computed once, stay in cache. Blocks follow each other in time. If a block has several chunks of a row, a
first loop finds their initial states from what each chunk but the last leaves behind when it starts from zero; a second
one runs all of them from there. The gradient of h_t obeys the same recurrence backwards in time, so its chunks are
joined in the same way, the last one first.

States are stored as (N, E): along the contiguous channels dt and x are vectors, B and C are scalars. Powers are to base
2, with log2(e) in A, which halves their time on a CPU.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hybridlm.ops.norm import at_least_fp32
from hybridlm.ops.padding import in_chunks

_STEP = 1 << 18  # numbers in one step of a block, at most: enough to share between threads, and in their L2 caches
_SPACE = 1 << 22  # numbers in the decays of a block of more than one chunk, at most: they stay in the L3 cache


class _Block(NamedTuple):
    """r rows, and c successive chunks of each."""

    rows: slice
    chunks: slice
    r: int
    c: int

    @property
    def k(self) -> int:
        return self.r * self.c

    def steps(self, cut: Tensor, axis: int) -> Tensor:
        """(B, chunks, Q, W) to this block's (Q, k, W), contiguous, with an axis of one at ``axis`` besides."""
        steps = cut[self.rows, self.chunks].permute(2, 0, 1, 3).reshape(cut.shape[2], self.k, cut.shape[3])
        return steps.contiguous().unsqueeze(axis)

    def put(self, steps: Tensor, cut: Tensor) -> None:
        """Writes this block's (Q, k, W), with an axis of one anywhere, into (B, chunks, Q, W)."""
        cut[self.rows, self.chunks] = steps.view(-1, self.r, self.c, cut.shape[3]).permute(1, 2, 0, 3)

    def apart(self, steps: Tensor) -> Tensor:
        """(..., k, N, E) to (..., r, c, N, E)."""
        return steps.view(*steps.shape[:-3], self.r, self.c, *steps.shape[-2:])


class Cut(NamedTuple):
    """The inputs in chunks (B, chunks, Q, W), all in the wide dtype, and how they are worked off."""

    x: Tensor  # W = E
    dt: Tensor  # W = E
    forget: Tensor  # W = E: dt as it decays the state, infinite where the state is dropped
    B: Tensor  # W = N
    C: Tensor  # W = N
    A: Tensor  # (N, E), times log2(e)
    blocks: list[_Block]  # those of a row in the order of time
    decay: Tensor  # flat space for one block's decays (Q, k, N, E)


class _Steps(NamedTuple):
    """One block, position by position."""

    dt: Tensor  # (Q, k, 1, E)
    forget: Tensor  # (Q, k, 1, E)
    written: Tensor  # (Q, k, 1, E): dt x
    B: Tensor  # (Q, k, N, 1)
    C: Tensor  # (Q, k, 1, N)
    decay: Tensor  # (Q, k, N, E): room for exp(dt A)


def _even(total: int, most: int) -> list[slice]:
    """``range(total)`` in as few slices of at most ``most`` as will do, about equally long."""
    size = -(-total // -(-total // most))
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _blocks(batch: int, n_chunks: int, length: int, width: int) -> list[_Block]:
    """All blocks of chunks of ``length`` positions. width: numbers in one state, N E."""
    k = max(1, min(_STEP // width, _SPACE // (width * length)))
    by_rows = ((rows, rows.stop - rows.start) for rows in _even(batch, k))
    return [
        _Block(rows, chunks, r, chunks.stop - chunks.start) for rows, r in by_rows for chunks in _even(n_chunks, k // r)
    ]


def cut_inputs(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor | None, chunk: int) -> Cut:
    dtype = at_least_fp32(x.dtype)
    x_cut, dt_cut, B_cut, C_cut = (in_chunks(tensor, chunk, dtype).contiguous() for tensor in (x, dt, B, C))
    forget = dt_cut if starts is None else in_chunks(dt.masked_fill(starts.unsqueeze(-1), math.inf), chunk, dtype)
    # No finite dt can tell the bound from 0, but an infinite one then drops the state even where exp(A_log) has become
    # 0.
    A_log2 = (A.to(dtype).t() * math.log2(math.e)).clamp_max(-torch.finfo(dtype).tiny).contiguous()
    blocks = _blocks(len(x_cut), x_cut.shape[1], chunk, A.numel())
    decay = x_cut.new_empty(chunk * max(block.k for block in blocks) * A.numel())
    return Cut(x_cut, dt_cut, forget, B_cut, C_cut, A_log2, blocks, decay)


def _load(cut: Cut, block: _Block) -> _Steps:
    dt = block.steps(cut.dt, 2)
    forget = dt if cut.forget is cut.dt else block.steps(cut.forget, 2)
    shape = (*dt.shape[:2], *cut.A.shape)
    decay = cut.decay[: math.prod(shape)].view(shape)
    return _Steps(dt, forget, dt * block.steps(cut.x, 2), block.steps(cut.B, 3), block.steps(cut.C, 2), decay)


def _whole(block: _Block, steps: _Steps, A: Tensor) -> Tensor:
    """The decay over each whole chunk: (r, c, N, E)."""
    return block.apart((steps.forget.sum(0) * A).exp2_())


def _beginnings(block: _Block, steps: _Steps, A: Tensor, begin: Tensor) -> None:
    """Fills in the states (r, c, N, E) in which the block's chunks begin, of which the first is there; and the
    decays."""
    left = None
    at = zip(
        steps.forget,
        steps.decay,
        block.apart(steps.decay),
        block.apart(steps.written),
        block.apart(steps.B),
        strict=True,
    )
    for forget, raised, decay, written, B in at:
        torch.mul(forget, A, out=raised).exp2_()
        if block.c == 1:
            continue
        if left is None:
            left = written[:, :-1] * B[:, :-1]
        else:
            left.mul_(decay[:, :-1]).addcmul_(written[:, :-1], B[:, :-1])
    if left is not None:
        whole = _whole(block, steps, A)
        for j in range(block.c - 1):
            begin[:, j + 1] = torch.addcmul(left[:, j], begin[:, j], whole[:, j])


def forward(cut: Cut, D: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """y (B, chunks, Q, E) and the states at every chunk boundary (B, chunks + 1, N, E), the initial one first."""
    states = cut.x.new_empty(cut.x.shape[0], cut.x.shape[1] + 1, *cut.A.shape)
    states[:, 0] = 0.0 if initial_state is None else initial_state.to(states.dtype).transpose(1, 2)
    y = torch.empty_like(cut.x)
    for block in cut.blocks:
        steps, begin = _load(cut, block), states[block.rows, block.chunks]
        _beginnings(block, steps, cut.A, begin)
        h = begin.clone(memory_format=torch.contiguous_format).flatten(0, 1)  # (k, N, E)
        y_steps = torch.empty_like(steps.dt)
        for decay, written, B, C, y_t in zip(steps.decay, steps.written, steps.B, steps.C, y_steps, strict=True):
            h.mul_(decay).addcmul_(written, B)
            torch.bmm(C, h, out=y_t)  # with out=, autocast does not touch a product
        block.put(y_steps, y)
        states[block.rows, block.chunks.stop] = block.apart(h)[:, -1]
    return y.addcmul_(cut.x, D.to(y.dtype)), states


def _ends(block: _Block, steps: _Steps, A: Tensor, dy: Tensor, end: Tensor) -> None:
    """``_beginnings`` mirrored: completes the gradients (r, c, N, E) of the states in which the block's chunks end, of
    which the last is complete. dy: (Q, k, 1, E)."""
    if block.c == 1:
        return
    left = None
    at = list(zip(block.apart(steps.decay), block.apart(dy), block.apart(steps.C.transpose(2, 3)), strict=True))
    for decay, dy_t, C in reversed(at):
        left = dy_t[:, 1:] * C[:, 1:] if left is None else left.addcmul_(dy_t[:, 1:], C[:, 1:])
        left.mul_(decay[:, 1:])
    assert left is not None
    whole = _whole(block, steps, A)
    for j in reversed(range(block.c - 1)):
        end[:, j] += torch.addcmul(left[:, j], end[:, j + 1], whole[:, j + 1])


class _StepGrads(NamedTuple):
    """What the positions of one block give; A's is summed over all blocks."""

    decay: Tensor  # (Q, k, 1, E): of dt, through the decays
    written: Tensor  # (Q, k, 1, E)
    B: Tensor  # (Q, k, N, 1)
    C: Tensor  # (Q, k, N, 1)
    A: Tensor  # (k, N, E)


def _states(steps: _Steps, A: Tensor, dy: Tensor, h: Tensor, grads: _StepGrads) -> None:
    """Fills h (Q + 1, k, N, E), the states before and after every position, of which the first is there; the decays;
    and C's gradient."""
    at = zip(h, h[1:], steps.forget, steps.decay, steps.written, steps.B, dy.transpose(2, 3), grads.C, strict=False)
    for before, after, forget, decay, written, B, dy_t, dC in at:
        torch.mul(forget, A, out=decay).exp2_()
        torch.mul(before, decay, out=after).addcmul_(written, B)
        torch.bmm(after, dy_t, out=dC)


def _block_backward(steps: _Steps, A: Tensor, dy: Tensor, g: Tensor, h: Tensor, grads: _StepGrads) -> None:
    """Turns g (k, N, E), the gradient of the states in which the chunks end, into that of those in which they begin. A:
    without log2(e)."""
    rate, ones = torch.empty_like(g), torch.ones_like(steps.C[0])
    at = list(
        zip(
            steps.dt,
            steps.written.transpose(2, 3),
            steps.B.transpose(2, 3),
            steps.C.transpose(2, 3),
            steps.decay,
            strict=True,
        )
    )
    to = zip(h, dy, grads.B, grads.written, grads.decay, strict=False)
    for (dt, written, B, C, decay), (before, dy_t, dB, dwritten, ddecay) in reversed(list(zip(at, to, strict=True))):
        g.addcmul_(dy_t, C)
        torch.bmm(g, written, out=dB)
        torch.bmm(B, g, out=dwritten)
        g.mul_(decay)
        torch.mul(g, before, out=rate)  # the gradient of dt A
        grads.A.addcmul_(rate, dt)
        torch.bmm(ones, rate.mul_(A), out=ddecay)


def backward(
    cut: Cut, A: Tensor, D: Tensor, states: Tensor, dy: Tensor, dstates: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor, Tensor, Tensor]:
    """Gradients of x, dt, B, C, cut as these are, and of A (E, N), D (E,) and the initial state (B, N, E); all wide.

    A: (E, N), as it was given; dy: (B, T, E); dstates: (B, chunks + 1, N, E), of all boundaries.
    """
    length, (state, channels) = cut.x.shape[2], cut.A.shape
    dy_cut, dstates = in_chunks(dy, length, cut.x.dtype), dstates.clone()
    dx, ddt, dB, dC = (torch.empty_like(inputs) for inputs in (cut.x, cut.dt, cut.B, cut.C))
    A = A.to(cut.x.dtype).t().contiguous()
    dA = cut.x.new_zeros(max(block.k for block in cut.blocks), state, channels)
    h = cut.x.new_empty((length + 1) * dA.numel())
    for block in reversed(cut.blocks):
        steps, dy_steps = _load(cut, block), block.steps(dy_cut, 2)
        ddecay, dwritten, dB_steps, dC_steps = (torch.empty_like(of) for of in (steps.dt, steps.dt, steps.B, steps.B))
        grads = _StepGrads(ddecay, dwritten, dB_steps, dC_steps, dA[: block.k])
        h_steps = h[: (length + 1) * grads.A.numel()].view(length + 1, *grads.A.shape)
        h_steps[0] = states[block.rows, block.chunks].flatten(0, 1)
        _states(steps, cut.A, dy_steps, h_steps, grads)
        end = dstates[block.rows, block.chunks.start + 1 : block.chunks.stop + 1]
        _ends(block, steps, cut.A, dy_steps, end)
        g = end.clone(memory_format=torch.contiguous_format).flatten(0, 1)
        _block_backward(steps, A, dy_steps, g, h_steps, grads)
        dstates[block.rows, block.chunks.start] += block.apart(g)[:, 0]
        block.put(grads.decay.addcmul_(grads.written, block.steps(cut.x, 2)), ddt)
        block.put(grads.written.mul_(steps.dt), dx)
        block.put(grads.B, dB)
        block.put(grads.C, dC)
    dD = (dy_cut * cut.x).sum((0, 1, 2))
    return (dx.addcmul_(dy_cut, D.to(dx.dtype)), ddt, dB, dC), dA.sum(0).t(), dD, dstates[:, 0]
