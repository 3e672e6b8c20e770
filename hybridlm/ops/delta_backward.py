"""Backward of the chunked gated delta rule in ``delta_chunks.py``, by hand, from the inputs and the states between the
chunks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hybridlm.ops.delta_chunks import Chunks, Tiles, tiles_of
from hybridlm.ops.delta_pairs import pairs_backward


class Gradients(NamedTuple):
    """Of the inputs, and of the state that comes into the first chunk (M, Dk, Dv)."""

    kq: Tensor  # (chunks, B, Hk, 2, C, Dk)  keys, then queries, as they were given
    v: Tensor  # (N, C, Dv)
    log_decay: Tensor  # (N, C, d)
    beta: Tensor  # (N, C, 1)
    state: Tensor


def backward(chunks: Chunks, incoming: Tensor, do: Tensor, dfinal: Tensor) -> Gradients:
    """incoming: (N, Dk, Dv), the states that ``forward`` went through; do: (chunks, B, H, C, Dv), a view; dfinal:
    (M, Dk, Dv)."""
    tiles, (keys, queries) = tiles_of(chunks), chunks.kq.unbind(1)
    reading = chunks.kq * tiles.carry.unsqueeze(1)
    error = torch.baddbmm(chunks.v, reading[:, 0], incoming, alpha=-1)  # what the incoming state does not predict of v
    delta = torch.bmm(tiles.inverse, error * chunks.beta)
    reading[:, 0].mul_(-chunks.beta)
    dboth, doutgoing, dincoming = _states_backward(chunks, tiles, reading.flatten(1, 2), do, dfinal)

    dtiles = torch.bmm(dboth.flatten(1, 2), delta.transpose(1, 2)).view(*chunks.kq.shape[:3], -1)
    itself = dtiles[:, 1].diagonal(dim1=1, dim2=2).unsqueeze(-1).clone()
    dbeta = error.mul_(dboth[:, 0]).sum(-1, keepdim=True).sub_((dtiles[:, 0] * tiles.A).sum(-1, keepdim=True))
    dtiles[:, 0].mul_(-chunks.beta)
    dboth[:, 0].mul_(chunks.beta)
    up, down = pairs_backward(dtiles, chunks.kq, chunks.steps, chunks.same, tiles.weights)
    dread = torch.bmm(dboth.flatten(1, 2), incoming.transpose(1, 2)).view(up.shape)
    dk, dq = up[:, 0].addcmul_(dread[:, 0], tiles.carry, value=-1.0), up[:, 1].addcmul_(dread[:, 1], tiles.carry)
    dwriting = torch.bmm(delta, doutgoing.transpose(1, 2)).mul_(tiles.to_end)

    dsums = torch.sub(dk, down).mul_(keys).addcmul_(dq, queries)
    dsums[:, -1].addcmul_(tiles.carry[:, -1], (incoming * doutgoing).sum(-1))
    dlog_decay = _to_steps(chunks, dsums, keys * dwriting)
    dk.add_(down).add_(dwriting).addcmul_(queries, itself)  # a token in its own output
    dq.addcmul_(keys, itself)
    return Gradients(_lengths_backward(chunks, up), dboth[:, 0], dlog_decay, dbeta, dincoming)


def _states_backward(
    chunks: Chunks, tiles: Tiles, reading: Tensor, do: Tensor, dfinal: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Through the chain of states, last chunk first. Returns the gradient of beta error above do (N, 2, C, Dv), that of
    each chunk's outgoing state (N, Dk, Dv), and that of the first incoming one. reading: (N, 2 C, Dk), the keys times
    -beta."""
    dboth = chunks.v.new_empty(len(chunks.v), 2, *chunks.v.shape[1:])
    dboth[:, 1].unflatten(0, do.shape[:3]).copy_(do)
    ddelta = torch.bmm(tiles.P.transpose(1, 2), dboth[:, 1])
    writing, keep = chunks.kq[:, 0] * tiles.to_end, tiles.carry[:, -1].unsqueeze(-1)
    parts, dincoming = chunks.each(), torch.empty_like(dfinal)
    doutgoing = dfinal.new_empty(len(chunks.v), *dfinal.shape[1:])
    doutgoing[parts[-1]] = dfinal
    before = [dincoming, *(doutgoing[part] for part in parts[:-1])]  # the chunk's incoming state
    for part, dstate in zip(reversed(parts), reversed(before), strict=True):
        ddelta[part].baddbmm_(writing[part], doutgoing[part])
        dboth[part, 0] = torch.bmm(tiles.inverse[part].transpose(1, 2), ddelta[part])
        torch.mul(doutgoing[part], keep[part], out=dstate)
        dstate.baddbmm_(reading[part].transpose(1, 2), dboth[part].flatten(1, 2))
    return dboth, doutgoing, dincoming


def _to_steps(chunks: Chunks, dsums: Tensor, dto_end: Tensor) -> Tensor:
    """Gradient of log_decay from those of its running sums and of log(to_end): sums over the tokens behind and before
    in the document."""
    if chunks.steps.shape[-1] == 1:
        dsums, dto_end = dsums.sum(-1, keepdim=True), dto_end.sum(-1, keepdim=True)
    if chunks.same is None or chunks.began is None:
        return dsums.flip(1).cumsum(1).flip(1).add_(F.pad(dto_end[:, :-1], (0, 0, 1, 0)).cumsum(1))
    dsteps = torch.bmm(chunks.same.transpose(1, 2), dsums).add_(torch.bmm(chunks.same, dto_end)).sub_(dto_end)
    return dsteps.masked_fill_(chunks.began, 0.0)


def _lengths_backward(chunks: Chunks, dkq: Tensor) -> Tensor:
    """From the gradient of the keys and queries at unit length, of every value head, to that of them as they were
    given."""
    of_groups = (*chunks.lengths.shape[:3], -1, *dkq.shape[1:])
    unit, dkq = chunks.kq.view(of_groups)[:, :, :, 0], dkq.view(of_groups)
    dkq = dkq.sum(3) if dkq.shape[3] > 1 else dkq.squeeze(3)
    along = (unit * dkq).sum(-1, keepdim=True)
    along[:, :, :, 1].mul_(unit.shape[-1])  # a query is Dk^-1/2 long
    return dkq.addcmul_(unit, along, value=-1.0).mul_(chunks.lengths)
