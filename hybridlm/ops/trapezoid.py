"""What is special to Mamba-3's recurrence (Lahoti et al. 2026): the trapezoidal rule, the angles, and one token of it
all.

The trapezoidal rule weighs both ends of a step: with alpha_t = exp(A_t dt_t),

    S_t = alpha_t S_{t-1} + (1 - lambda_t) dt_t alpha_t x_{t-1} k_{t-1}^T + lambda_t dt_t x_t k_t^T

Token s therefore enters the state twice, at its own step and at the next, where alpha_{s+1} decays it like everything
before. A scan with one write per token is the same if that write weighs lambda_s dt_s + (1 - lambda_{s+1}) dt_{s+1}, a
look-ahead by one token; only what token s reads of itself weighs lambda_s dt_s.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from hybridlm.ops.dispatch import autocast_off, called, gradient_wanted
from hybridlm.ops.mimo_tiles import pairs
from hybridlm.ops.norm import as_dtype

_SPAN = 64  # tokens that are summed in one matrix product


def previous_weight(dt: Tensor, mix: Tensor, starts: Tensor | None) -> Tensor:
    """(1 - lambda_t) dt_t, what step t adds of the token before it; 0 where token t begins a document. dt, mix: (B, T,
    H)."""
    weight = (1 - mix) * dt
    return weight if starts is None else weight.masked_fill(starts.unsqueeze(-1), 0.0)


def write_weight(own: Tensor, previous: Tensor, valid: Tensor | None) -> Tensor:
    """own_s + previous_{s+1}, what token s writes into the state in all, (B, T, H): nothing follows the last token, and
    padding writes nothing though a token follows it."""
    ahead = F.pad(previous[:, 1:], (0, 0, 0, 1))
    weight = own + ahead
    return weight if valid is None else weight.masked_fill(~valid.unsqueeze(-1), 0.0)


def carried_state(
    state: Tensor, k: Tensor, v: Tensor, previous: Tensor, padding: Tensor | None, mimo_x: Tensor | None
) -> Tensor:
    """The state (B, H, P, N) with what the first new token adds of the token before it, from which the scan may start.

    k: (B, R, H, N) and v: (B, H, P) of that token; previous: (B, T, H), see ``previous_weight``; padding: (B,) columns
    in front of the first token; mimo_x: (H, R, P), None: ones.
    """
    if padding is None:
        weight = previous[:, 0]
    else:  # a row that is all padding has dt = 0 in every column
        column = padding.clamp_max(previous.shape[1] - 1).view(-1, 1, 1).expand(-1, 1, previous.shape[2])
        weight = previous.gather(1, column).squeeze(1)
    return state + weight.to(state.dtype)[..., None, None] * written(k, v, mimo_x)


def written(k: Tensor, v: Tensor, mimo_x: Tensor | None) -> Tensor:
    """sum_r (mimo_x_r * v) k_r^T: (B, H, P, N). k: (B, R, H, N), v: (B, H, P), mimo_x: (H, R, P) or None (ones)."""
    if mimo_x is None:
        return v.unsqueeze(-1) * k.sum(1).unsqueeze(2)
    ranks = v.unsqueeze(2) * mimo_x.to(v.dtype)  # (B, H, R, P)
    with autocast_off(v):
        return ranks.transpose(2, 3) @ k.transpose(1, 2)


def angles(rate: Tensor, dt: Tensor, initial: Tensor | None, starts: Tensor | None) -> Tensor:
    """theta_t = theta_{t-1} + pi tanh(rate_t) dt_t in [0, 2 pi), begun anew at 0 in front of every document: (B, H, n,
    T), dt's dtype.

    rate: (B, T, n), shared by the heads; dt: (B, T, H); initial: (B, H, n) or None (zeros); starts: (B, T) or None. The
    sum is taken in float64, pi included, and reduced before it is rounded: no drift however long the text.
    """
    turn = math.pi * rate.to(dt.dtype).tanh().double()
    theta = turn.transpose(1, 2).unsqueeze(1) * dt.transpose(1, 2).unsqueeze(2)  # (B, H, n, T), the steps
    if dt.shape[1] > 1:
        theta = theta.cumsum(-1) if starts is None else called(_document_sums, theta, starts, False)
    if initial is not None:
        before = initial.unsqueeze(-1).double()
        if starts is not None:
            before = before.masked_fill(starts.cummax(1).values[:, None, None], 0.0)
        theta = theta + before
    return theta.remainder(2 * math.pi).to(dt.dtype)


def _running_sums(values: Tensor, starts: Tensor) -> Tensor:
    """Running sums along the last axis, begun anew at every start: (B, C, T). values: (B, C, T); starts: (B, T).

    No document's sum is taken as the difference of two longer ones: the other documents do not even round into it.
    """
    batch, channels, time = values.shape
    length = min(time, _SPAN)
    values, starts = (F.pad(tensor, (0, -time % length)) for tensor in (values, starts))
    document = starts.view(batch, -1, length).cumsum(-1)  # (B, spans, Q), counted within the span
    same = (document.unsqueeze(3) == document.unsqueeze(2)).to(values.dtype).tril_()  # (B, spans, Q, Q)
    sums = values.view(batch, channels, -1, length).transpose(1, 2) @ same.transpose(2, 3)  # (B, spans, C, Q)
    if sums.shape[1] > 1:  # what the last document of each span brings into the next
        begins = document[:, :, -1] > 0
        carried = _running_sums(sums[..., -1].transpose(1, 2), begins).transpose(1, 2)[:, :-1]  # (B, spans - 1, C)
        sums[:, 1:] += carried.unsqueeze(3).masked_fill(document[:, 1:].unsqueeze(2) > 0, 0.0)
    return sums.transpose(1, 2).flatten(2)[..., :time].contiguous()


@torch.library.custom_op("hybridlm::document_sums", mutates_args=())
def _document_sums(values: Tensor, starts: Tensor, reverse: bool) -> Tensor:
    """Running sums of values (B, H, n, T) within each document, from its first token on or, ``reverse``, from its last
    one back.

    Either direction is the other's gradient. Autograd's own, over the whole row, would leave a rounding error in other
    documents.
    """
    with autocast_off(values):
        flat = values.flatten(1, 2)
        if not reverse:
            return _running_sums(flat, starts).view(values.shape)
        ends = F.pad(starts[:, 1:], (0, 1), value=True)
        return _running_sums(flat.flip(-1), ends.flip(-1)).flip(-1).view(values.shape)


_document_sums.register_fake(lambda values, starts, reverse: values.new_empty(values.shape))


def _setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
    _, starts, reverse = inputs
    ctx.save_for_backward(starts)
    ctx.reverse = reverse  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, dsums: Tensor) -> tuple[Tensor, None, None]:
    (starts,) = ctx.saved_tensors  # type: ignore[attr-defined]
    return _document_sums(dsums, starts, not ctx.reverse), None, None  # type: ignore[attr-defined]


_document_sums.register_autograd(_backward, setup_context=_setup)


def turned(v: Tensor, bias: Tensor, theta: Tensor | None, *, adjacent: bool) -> Tensor:
    """Rot(theta) (v + bias) of one token: (B, R, H, N). v: (B, R, G, N), theta: (B, H, n) or None, bias: (H, R, N)."""
    biased = v.repeat_interleave(bias.shape[0] // v.shape[2], dim=2) + as_dtype(bias, v.dtype).transpose(0, 1)
    if theta is None:
        return biased
    cos, sin = theta.unsqueeze(1).cos(), theta.unsqueeze(1).sin()
    out = biased.clone()  # not turned in place: autograd may need the old values
    (a, b), (out_a, out_b) = (pairs(tensor, cos.shape[-1], adjacent, -1) for tensor in (biased, out))
    out_a.copy_(torch.addcmul(a * cos, b, sin, value=-1.0))
    out_b.copy_(torch.addcmul(b * cos, a, sin))
    return out


def trapezoid_step(
    x: Tensor,
    decay: Tensor,
    own: Tensor,
    k: Tensor,
    c: Tensor,
    D: Tensor,
    mimo_x: Tensor | None,
    state: Tensor,
    *,
    before: tuple[Tensor, Tensor, Tensor] | None,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence: the output of every rank (B, R, H, P) and the new state (B, H, P, N).

    x: (B, H, P); decay, alpha_t, and own, lambda_t dt_t: (B, H); k, c: (B, R, H, N), rotated; D: (H,); mimo_x: (H, R,
    P), None: ones; state: (B, H, P, N). All in the dtype to compute in, but for D and mimo_x. before: (1 - lambda_t)
    dt_t (B, H), and k and x of the token before; None: no trapezoid. ``overwrite``: the state may be changed in place.
    """
    tokens, weights, keys = x.unsqueeze(2), own.unsqueeze(2), k
    if before is not None:  # the writes of both tokens in one product
        tokens, weights = torch.stack((before[2], x), 2), torch.stack((before[0] * decay, own), 2)
        keys = torch.cat((before[1], k), 1)
    ranks = tokens.unsqueeze(3).expand(-1, -1, -1, k.shape[1], -1)  # (B, H, tokens, R, P)
    if mimo_x is not None:
        ranks = ranks * as_dtype(mimo_x, x.dtype).unsqueeze(1)
    skip, values = ranks[:, :, -1], (ranks * weights[..., None, None]).flatten(2, 3)
    wanted = gradient_wanted(x, decay, own, k, c, D, mimo_x, state, *(before or ()))
    decay = decay[..., None, None]
    state = state.mul_(decay) if overwrite and state.is_contiguous() and not wanted else (state * decay).contiguous()
    with autocast_off(x):
        flat = state.flatten(0, 1)  # (B H, P, N), the same memory
        flat.baddbmm_(values.flatten(0, 1).transpose(1, 2), keys.transpose(1, 2).flatten(0, 1))
        y = torch.bmm(c.transpose(1, 2).flatten(0, 1), flat.transpose(1, 2)).view(skip.shape)
    return y.addcmul_(as_dtype(D, x.dtype).view(-1, 1, 1), skip).transpose(1, 2), state
