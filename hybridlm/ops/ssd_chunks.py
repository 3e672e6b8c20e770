"""The arithmetic of the scan in ``ops.ssd``, which see: inputs cut into chunks, forward, and backward, on plain
tensors.

Heads are processed one at a time, so that a tile of (chunks, Q, Q) stays in cache.

Logarithms and powers are to base 2. On a CPU torch's exp is slower than its exp2, and many times slower where it
underflows, as a decay over a chunk often does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hybridlm.ops.norm import at_least_fp32
from hybridlm.ops.padding import in_chunks

_TINY = 1e-30  # in the backward scale is at least this: it is zero at padding, and its gradient is a quotient by it
# exponents of masked pairs may be large: clamped, so that no 0 * inf becomes NaN
_CAP = 30.0


class Chunks(NamedTuple):
    """The inputs cut into chunks of Q tokens. BC = batch x chunks; all in the wide dtype."""

    x: Tensor  # (BC, Q, H, P)
    B: Tensor  # (BC, Q, G, N)
    C: Tensor  # (BC, Q, G, N)
    scale: Tensor  # (BC, Q, H)
    decay: (
        Tensor  # (H, BC, Q)  c_l: running sum of log_decay to base 2, from the first token of the chunk or document on
    )
    reach: Tensor  # (H, BC, Q)  log2(scale_s) - c_s
    carry: Tensor  # (BC, Q, H)  2^c_l, the weight of the incoming state; zero once a document has started
    # (BC, Q, H)  2^(c_Q - c_s) scale_s, the weight of a token in the outgoing state; zero before the last start
    to_end: Tensor
    past: Tensor | None  # (BC, Q, Q)  one where s < l are of one document, else zero; None: one document
    began: Tensor | None  # (BC, Q, 1)  True where a document starts

    def weights(self, head: int) -> Tensor:
        """2^(c_l - c_s) scale_s for s < l of one document, else 0: (BC, Q, Q) of one head."""
        weights = self.decay[head].unsqueeze(2) + self.reach[head].unsqueeze(1)
        weights = weights.clamp_max_(_CAP).exp2_()
        return weights.tril_(-1) if self.past is None else weights.mul_(self.past)

    def scores(self, group: int) -> Tensor:
        """C_l B_s: (BC, Q, Q)."""
        return torch.bmm(self.C[:, :, group], self.B[:, :, group].transpose(1, 2))

    def to_steps(self, dsums: Tensor, dto_end: Tensor) -> Tensor:
        """Gradient of log_decay from those of its running sums and of log(to_end); all (BC, Q, H)."""
        if self.past is None or self.began is None:
            return dsums.flip(1).cumsum(1).flip(1).add_(F.pad(dto_end[:, :-1], (0, 0, 1, 0)).cumsum(1))
        steps = torch.bmm(self.past.transpose(1, 2), dsums).add_(dsums).add_(torch.bmm(self.past, dto_end))
        return steps.masked_fill_(self.began, 0.0)

    def channels(self) -> list[slice]:
        """The channels of each group in a tensor (..., H P)."""
        heads, head_dim = self.x.shape[2:]
        width = heads // self.B.shape[2] * head_dim
        return [slice(first, first + width) for first in range(0, heads * head_dim, width)]

    def group_heads(self, group: int) -> range:
        """The heads that read this group's B and C."""
        each = self.x.shape[2] // self.B.shape[2]
        return range(group * each, (group + 1) * each)


def cut(tensor: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
    """(B, T, ...) to (B * chunks, chunk, ...)."""
    return in_chunks(tensor, chunk, dtype).flatten(0, 1)


def into_chunks(
    x: Tensor,
    log_decay: Tensor,
    scale: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor | None,
    chunk: int,
    *,
    backward: bool,
) -> Chunks:
    """Arguments as in ``ops.ssd.scan``. In the forward a scale of zero weighs exactly zero, in the backward nearly
    so."""
    dtype = at_least_fp32(x.dtype)
    x, steps, scale, B, C = (cut(tensor, chunk, dtype) for tensor in (x, log_decay, scale, B, C))
    if backward:
        scale = scale.clamp_min(_TINY)
    steps, past, began = steps * math.log2(math.e), None, None
    if starts is None:
        decay = steps.cumsum(1)
        carry, to_end = decay.exp2(), (decay[:, -1:] - decay).exp2_()
    else:
        began = cut(starts, chunk, torch.bool).unsqueeze(-1)
        document = began.cumsum(1)  # (BC, Q, 1), counted within the chunk
        past = (document == document.transpose(1, 2)).to(dtype).tril_(-1)
        # A sum of each document's own steps: as the difference of two longer sums it would carry the rounding of other
        # documents.
        steps = steps.masked_fill(began, 0.0)
        decay = torch.bmm(past, steps).add_(steps)
        carry = decay.masked_fill(document > 0, -torch.inf).exp2_()
        to_end = (decay[:, -1:] - decay).masked_fill_(document < document[:, -1:], -torch.inf).exp2_()
    reach = (scale.log2() - decay).permute(2, 0, 1).contiguous()
    return Chunks(x, B, C, scale, decay.permute(2, 0, 1).contiguous(), reach, carry, to_end.mul_(scale), past, began)


def _by_group(chunks: Chunks, product: Callable[[int, slice], Tensor]) -> Tensor:
    """(..., H P) of what ``product`` gives for each group and its channels."""
    parts = [product(g, part) for g, part in enumerate(chunks.channels())]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def forward(chunks: Chunks, D: Tensor, initial_state: Tensor | None, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y (BC, Q, H, P), the state that comes into each chunk (B, chunks, N, H, P), and the final state (B, N, H,
    P)."""
    rows, chunk, heads, head_dim = chunks.x.shape
    d_state, n_chunks = chunks.B.shape[3], rows // batch
    by_chunk = (batch, n_chunks, d_state, heads, head_dim)

    # What each chunk writes into the state, all heads of a group in one product, then the chain of states.
    weighted = (chunks.x * chunks.to_end.unsqueeze(-1)).view(rows, chunk, -1)
    written = _by_group(
        chunks, lambda g, part: torch.bmm(chunks.B[:, :, g].transpose(1, 2), weighted[:, :, part])
    ).view(by_chunk)
    incoming = torch.empty_like(written)
    incoming[:, 0] = 0.0 if initial_state is None else initial_state.to(written.dtype).permute(0, 3, 1, 2)
    decay = chunks.carry[:, -1].view(batch, n_chunks, 1, heads, 1)
    for c in range(n_chunks - 1):
        torch.addcmul(written[:, c], incoming[:, c], decay[:, c], out=incoming[:, c + 1])
    final = torch.addcmul(written[:, -1], incoming[:, -1], decay[:, -1])

    # What the incoming state contributes, then what the chunk's own tokens do.
    states = incoming.view(rows, d_state, -1)
    y = _by_group(chunks, lambda g, part: torch.bmm(chunks.C[:, :, g], states[:, :, part])).view(chunks.x.shape)
    y.mul_(chunks.carry.unsqueeze(-1))
    own = []
    for g in range(chunks.B.shape[2]):
        scores = chunks.scores(g)
        for h in chunks.group_heads(g):
            y[:, :, h] += torch.bmm(chunks.weights(h).mul_(scores), chunks.x[:, :, h])
            own.append(scores.diagonal(dim1=1, dim2=2))
    y.addcmul_(chunks.x, _itself(chunks, torch.stack(own, dim=2), D))
    return y, incoming, final


def _itself(chunks: Chunks, CB: Tensor, D: Tensor) -> Tensor:
    """The weight of a token's x in its own output: (BC, Q, H, 1). CB: C_t B_t (BC, Q, H)."""
    return torch.addcmul(D.to(CB.dtype), chunks.scale, CB).unsqueeze(-1)


def backward(
    chunks: Chunks, D: Tensor, incoming: Tensor, dy: Tensor, dfinal: Tensor | None
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Gradients of x, log_decay, scale, B and C, in chunks; of D (H,); and of the initial state (B, N, H, P).

    incoming: from ``forward``; dy (BC, Q, H, P); dfinal: gradient of the final state, None where nothing reads it.
    """
    rows, chunk, heads, head_dim = chunks.x.shape
    batch, n_chunks = incoming.shape[:2]
    states = incoming.view(rows, -1, heads * head_dim)

    # Backward through the incoming state's contribution, then through the chain of states, last chunk first.
    dy_decayed = (dy * chunks.carry.unsqueeze(-1)).view(rows, chunk, -1)
    dread = _by_group(
        chunks, lambda g, part: torch.bmm(chunks.C[:, :, g].transpose(1, 2), dy_decayed[:, :, part])
    ).view(incoming.shape)
    dC, dsums = _read_backward(chunks, dy_decayed, states)
    doutgoing = torch.empty_like(incoming)
    doutgoing[:, -1] = 0.0 if dfinal is None else dfinal
    decay = chunks.carry[:, -1].view(batch, n_chunks, 1, heads, 1)
    for c in reversed(range(1, n_chunks)):
        torch.addcmul(dread[:, c], doutgoing[:, c], decay[:, c], out=doutgoing[:, c - 1])
    dinitial = torch.addcmul(dread[:, 0], doutgoing[:, 0], decay[:, 0])
    dsums[:, -1] += (doutgoing * incoming).sum(-1).sum(2).view(rows, heads) * chunks.carry[:, -1]

    # Backward through what the chunk writes into the state, then through the products of its own tokens.
    weighted, dstates = (chunks.x * chunks.to_end.unsqueeze(-1)).view(rows, chunk, -1), doutgoing.view(states.shape)
    dB = [torch.bmm(weighted[:, :, part], dstates[:, :, part].transpose(1, 2)) for part in chunks.channels()]
    dx = _by_group(chunks, lambda g, part: torch.bmm(chunks.B[:, :, g], dstates[:, :, part])).view(chunks.x.shape)
    dto_end = (chunks.x * dx.mul_(chunks.to_end.unsqueeze(-1))).sum(-1)
    dreach, dy_x, CB = _own_tokens_backward(chunks, dy, dx, dB, dC, dsums)

    dx.addcmul_(dy, _itself(chunks, CB, D))
    dlog_decay, dscale = (
        chunks.to_steps(dsums.sub_(dreach), dto_end),
        ((dto_end + dreach) / chunks.scale).addcmul_(CB, dy_x),
    )
    return (dx, dlog_decay, dscale, torch.stack(dB, 2), torch.stack(dC, 2)), dy_x.sum((0, 1)), dinitial


def _read_backward(chunks: Chunks, dy_decayed: Tensor, states: Tensor) -> tuple[list[Tensor], Tensor]:
    """Each group's dC (BC, Q, N), and the gradient of log(carry) (BC, Q, H), through what tokens read of the incoming
    state."""
    head_dim, dC, dcarry = chunks.x.shape[3], [], []
    for g in range(chunks.B.shape[2]):
        total = None
        for h in chunks.group_heads(g):
            part = slice(h * head_dim, (h + 1) * head_dim)
            of_head = torch.bmm(dy_decayed[:, :, part], states[:, :, part].transpose(1, 2))
            dcarry.append((of_head * chunks.C[:, :, g]).sum(-1))
            total = of_head if total is None else total.add_(of_head)
        assert total is not None
        dC.append(total)
    return dC, torch.stack(dcarry, dim=2)


def _own_tokens_backward(
    chunks: Chunks, dy: Tensor, dx: Tensor, dB: list[Tensor], dC: list[Tensor], dsums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Adds to dx and dsums what pairs of tokens of the chunk give, and to each group's dB and dC what all its products
    give.

    Returns the gradient of ``reach``, <dy_t, x_t>, and C_t B_t of each head's group: (BC, Q, H).
    """
    dreach, dy_x, own = [], [], []
    for g in range(len(dB)):
        scores = chunks.scores(g)
        dscores = torch.zeros_like(scores)
        for h in chunks.group_heads(g):
            weights = chunks.weights(h)
            pairs = torch.bmm(dy[:, :, h], chunks.x[:, :, h].transpose(1, 2))
            dy_x.append(pairs.diagonal(dim1=1, dim2=2).clone())
            dscores.add_(pairs.mul_(weights)).diagonal(dim1=1, dim2=2).addcmul_(dy_x[-1], chunks.scale[:, :, h])
            pairs.mul_(scores)  # what each pair gives to the loss
            dsums[:, :, h] += pairs.sum(2)
            dreach.append(pairs.sum(1))
            dx[:, :, h] += torch.bmm(weights.mul_(scores).transpose(1, 2), dy[:, :, h])
            own.append(scores.diagonal(dim1=1, dim2=2))
        dC[g] += torch.bmm(dscores, chunks.B[:, :, g])
        dB[g] += torch.bmm(dscores.transpose(1, 2), chunks.C[:, :, g])
    return torch.stack(dreach, dim=2), torch.stack(dy_x, dim=2), torch.stack(own, dim=2)
