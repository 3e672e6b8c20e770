"""State-space duality: Mamba-2's scan as matrix products over chunks (Dao & Gu 2024), with a hand-written backward.

The recurrence, per head h with scalar decay (x_t in R^P, B_t and C_t in R^N, state S in R^(P x N)):

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T          y_t = S_t C_t + D x_t

Inside a chunk of Q tokens, with c_t the running sum of dt A, token s reaches token l >= s with weight exp(c_l - c_s) dt_s, so a
chunk is one masked attention-like product plus what the incoming state contributes. Folding log(dt_s) into the exponent saves a
pass over x. Every exponent that counts is at most log(dt): nothing is divided by a product that could underflow.

The backward uses that y_l scales with exp(c_l), the weight of x_s with dt_s exp(-c_s), and the outgoing state with exp(c_Q): the
gradients of all decays are inner products of tensors that are at hand (<dy, y>, <x, dx>, <dS, S>), no Q x Q reduction is needed.

Heads are taken one at a time: a tile of (chunks, Q, Q) stays in cache, where all heads at once would go through memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hybridlm.ops.norm import at_least_fp32

_TINY = 1e-30  # dt is at least this where its logarithm is taken: padded tokens have dt = 0 and x = 0
_CAP = 30.0  # exponents above the diagonal may be large before they are masked: kept finite, so that no later product makes a NaN of them


class _Chunks(NamedTuple):
    """The inputs cut into chunks. BC = batch x chunks; all in the wide dtype."""

    x: Tensor  # (BC, Q, H, P)
    B: Tensor  # (BC, Q, G, N)
    C: Tensor  # (BC, Q, G, N)
    dt: Tensor  # (BC, Q, H)
    decay: Tensor  # (BC, Q, H)  c_l: running sum of dt A, from the chunk's first token on
    reach: Tensor  # (BC, Q, H)  log(dt_s) - c_s


def _cut(tensor: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
    """(B, T, ...) to (B * chunks, chunk, ...), padded with zeros: dt = 0 neither decays nor writes."""
    pad = -tensor.shape[1] % chunk
    tensor = tensor.to(dtype)
    if pad:
        tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, pad))
    return tensor.contiguous().view(-1, chunk, *tensor.shape[2:])


def _chunks(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: int) -> _Chunks:
    dtype = at_least_fp32(x.dtype)
    dt_cut = _cut(dt, chunk, dtype)
    decay = (dt_cut * A.to(dtype)).cumsum(1)
    reach = dt_cut.clamp_min(_TINY).log() - decay
    return _Chunks(_cut(x, chunk, dtype), _cut(B, chunk, dtype), _cut(C, chunk, dtype), dt_cut, decay, reach)


def _weights(cut: _Chunks, head: int) -> Tensor:
    """exp(c_l - c_s) dt_s for s <= l, else 0: (BC, Q, Q) of one head."""
    weights = cut.decay[:, :, head].unsqueeze(2) + cut.reach[:, :, head].unsqueeze(1)
    weights = weights.clamp_max_(_CAP).exp_().tril_()
    # On the diagonal the sums cancel exactly: written in, so that a long sum's rounding does not touch a token's own weight.
    weights.diagonal(dim1=1, dim2=2).copy_(cut.dt[:, :, head].clamp_min(_TINY))
    return weights


def _to_end(cut: _Chunks) -> Tensor:
    """exp(c_Q - c_s) dt_s, the weight of token s in the chunk's outgoing state: (BC, Q, H, 1)."""
    return ((cut.decay[:, -1:] - cut.decay).exp() * cut.dt.clamp_min(_TINY)).unsqueeze(-1)


def _group_slices(heads: int, groups: int, head_dim: int) -> list[slice]:
    width = heads // groups * head_dim
    return [slice(g * width, (g + 1) * width) for g in range(groups)]


@torch.library.custom_op("hybridlm::ssd", mutates_args=())
def _ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, initial_state: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """Returns y (B, T, H, P) and the states at every chunk boundary (B, chunks + 1, N, H, P), the initial one first; both wide."""
    batch, length, heads, head_dim = x.shape
    groups, d_state = B.shape[2], B.shape[3]
    cut = _chunks(x, dt, A, B, C, chunk)
    n_chunks = cut.x.shape[0] // batch
    flat = (cut.x.shape[0], chunk, heads * head_dim)

    # What each chunk writes into the state, all heads of a group in one product: (BC, N, H P).
    weighted = (cut.x * _to_end(cut)).view(flat)
    written = torch.empty(flat[0], d_state, flat[2], dtype=weighted.dtype, device=x.device)
    for g, part in enumerate(_group_slices(heads, groups, head_dim)):
        written[:, :, part] = torch.bmm(cut.B[:, :, g].transpose(1, 2), weighted[:, :, part])
    written = written.view(batch, n_chunks, d_state, heads, head_dim)

    states = torch.empty(batch, n_chunks + 1, d_state, heads, head_dim, dtype=weighted.dtype, device=x.device)
    states[:, 0] = 0.0 if initial_state is None else initial_state.to(weighted.dtype).permute(0, 3, 1, 2)
    chunk_decay = cut.decay[:, -1].exp().view(batch, n_chunks, 1, heads, 1)
    for c in range(n_chunks):
        torch.addcmul(written[:, c], states[:, c], chunk_decay[:, c], out=states[:, c + 1])

    # What the incoming state contributes, then what the chunk's own tokens do.
    incoming = states[:, :-1].reshape(flat[0], d_state, flat[2])
    y = torch.empty(flat, dtype=weighted.dtype, device=x.device)
    for g, part in enumerate(_group_slices(heads, groups, head_dim)):
        y[:, :, part] = torch.bmm(cut.C[:, :, g], incoming[:, :, part])
    y = y.view(cut.x.shape).mul_(cut.decay.exp().unsqueeze(-1)).addcmul_(cut.x, D.to(y.dtype).view(1, 1, heads, 1))
    for g in range(groups):
        scores = torch.bmm(cut.C[:, :, g], cut.B[:, :, g].transpose(1, 2))  # (BC, Q, Q)
        for h in range(g * heads // groups, (g + 1) * heads // groups):
            y[:, :, h] += torch.bmm(_weights(cut, h).mul_(scores), cut.x[:, :, h])
    return y.view(batch, -1, heads, head_dim)[:, :length].contiguous(), states


@_ssd.register_fake
def _(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, initial_state: Tensor | None, chunk: int) -> tuple[Tensor, Tensor]:
    batch, length, heads, head_dim = x.shape
    boundaries, wide = (length + chunk - 1) // chunk + 1, at_least_fp32(x.dtype)
    return x.new_empty(x.shape, dtype=wide), x.new_empty((batch, boundaries, B.shape[3], heads, head_dim), dtype=wide)


def _own_tokens_backward(cut: _Chunks, dy: Tensor, dx: Tensor, dB: Tensor, dC: Tensor) -> None:
    """Adds to dx, dB and dC what comes through the products within each chunk. dy: (BC, Q, H, P)."""
    heads, groups = dy.shape[2], dB.shape[2]
    for g in range(groups):
        scores = torch.bmm(cut.C[:, :, g], cut.B[:, :, g].transpose(1, 2))
        dscores = torch.zeros_like(scores)
        for h in range(g * heads // groups, (g + 1) * heads // groups):
            weights = _weights(cut, h)
            dscores.addcmul_(torch.bmm(dy[:, :, h], cut.x[:, :, h].transpose(1, 2)), weights)
            dx[:, :, h] += torch.bmm(weights.mul_(scores).transpose(1, 2), dy[:, :, h])
        dC[:, :, g] += torch.bmm(dscores, cut.B[:, :, g])
        dB[:, :, g] += torch.bmm(dscores.transpose(1, 2), cut.C[:, :, g])


@torch.library.custom_op("hybridlm::ssd_backward", mutates_args=())
def _ssd_backward(
    dy: Tensor, dstates: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, y: Tensor, states: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, D and the initial state (B, N, H, P)."""
    batch, length, heads, head_dim = x.shape
    groups, d_state = B.shape[2], B.shape[3]
    cut = _chunks(x, dt, A, B, C, chunk)
    n_chunks = cut.x.shape[0] // batch
    flat = (cut.x.shape[0], chunk, heads * head_dim)
    dy_cut, y_cut = _cut(dy, chunk, cut.x.dtype), _cut(y, chunk, cut.x.dtype)
    slices = _group_slices(heads, groups, head_dim)
    dB, dC = torch.empty_like(cut.B), torch.empty_like(cut.C)
    incoming = states[:, :-1].reshape(flat[0], d_state, flat[2])

    # Backward through the incoming state's contribution, then through the chain of states, last chunk first.
    dy_decayed = (dy_cut * cut.decay.exp().unsqueeze(-1)).view(flat)
    dincoming = torch.empty_like(incoming)
    for g, part in enumerate(slices):
        dC[:, :, g] = torch.bmm(dy_decayed[:, :, part], incoming[:, :, part].transpose(1, 2))
        dincoming[:, :, part] = torch.bmm(cut.C[:, :, g].transpose(1, 2), dy_decayed[:, :, part])
    dchain = dstates.clone()  # (B, chunks + 1, N, H, P); only the last boundary can have a gradient of its own from outside
    dincoming = dincoming.view(batch, n_chunks, d_state, heads, head_dim)
    chunk_decay = cut.decay[:, -1].exp().view(batch, n_chunks, 1, heads, 1)
    for c in reversed(range(n_chunks)):
        dchain[:, c] += torch.addcmul(dincoming[:, c], dchain[:, c + 1], chunk_decay[:, c])
    doutgoing = dchain[:, 1:].reshape(flat[0], d_state, flat[2])

    # Backward through what the chunk writes into the state.
    to_end = _to_end(cut)
    weighted = (cut.x * to_end).view(flat)
    dx = torch.empty(flat, dtype=cut.x.dtype, device=x.device)
    for g, part in enumerate(slices):
        dB[:, :, g] = torch.bmm(weighted[:, :, part], doutgoing[:, :, part].transpose(1, 2))
        dx[:, :, part] = torch.bmm(cut.B[:, :, g], doutgoing[:, :, part])
    dx = dx.view(cut.x.shape).mul_(to_end)

    _own_tokens_backward(cut, dy_cut, dx, dB, dC)

    # Decays: see the module's docstring. dx holds the scan's part only, so D's part is taken out of y and added to dx here.
    d_skip = D.to(dx.dtype).view(1, 1, heads, 1)
    skip = (dy_cut * cut.x).sum(-1)  # (BC, Q, H)
    through_x = (cut.x * dx).sum(-1)
    ddecay = (dy_cut * y_cut).sum(-1) - skip * d_skip.view(heads) - through_x
    ddecay[:, -1] += (dchain[:, 1:] * states[:, 1:]).sum((2, 4)).view(-1, heads)
    dlog_decay = ddecay.flip(1).cumsum(1).flip(1)  # of dt A at each token
    ddt = dlog_decay * A.to(dx.dtype) + through_x / cut.dt.clamp_min(_TINY)
    dA = (dlog_decay * cut.dt).sum((0, 1))
    dx.addcmul_(dy_cut, d_skip)

    def join(tensor: Tensor, like: Tensor) -> Tensor:
        return tensor.view(batch, -1, *tensor.shape[2:])[:, :length].to(like.dtype).contiguous()

    return join(dx, x), join(ddt, dt), dA.to(A.dtype), join(dB, B), join(dC, C), skip.sum((0, 1)).to(D.dtype), dchain[:, 0].contiguous()


@_ssd_backward.register_fake
def _(
    dy: Tensor, dstates: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, y: Tensor, states: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, ddt, dA, dB, dC, dD = (tensor.new_empty(tensor.shape) for tensor in (x, dt, A, B, C, D))  # contiguous, as the real ones are
    return dx, ddt, dA, dB, dC, dD, states.new_empty(states[:, 0].shape)


def _setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: tuple[Tensor, Tensor]) -> None:
    x, dt, A, B, C, D, initial_state, chunk = inputs
    ctx.save_for_backward(x, dt, A, B, C, D, *output)  # type: ignore[arg-type]
    ctx.chunk = chunk  # type: ignore[attr-defined]
    ctx.initial_dtype = initial_state.dtype if isinstance(initial_state, Tensor) else None  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor, dstates: Tensor) -> tuple[Tensor | None, ...]:
    x, dt, A, B, C, D, y, states = ctx.saved_tensors  # type: ignore[attr-defined]  # read once: activation checkpointing recomputes them
    *grads, dinitial = _ssd_backward(dy.contiguous(), dstates, x, dt, A, B, C, D, y, states, ctx.chunk)  # type: ignore[attr-defined]
    dtype = ctx.initial_dtype  # type: ignore[attr-defined]
    return (*grads, None if dtype is None else dinitial.permute(0, 2, 3, 1).to(dtype), None)


_ssd.register_autograd(_backward, setup_context=_setup)


def ssd_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of the recurrence. x: (B, H, P); dt: (B, H); B, C: (B, G, N); state: (B, H, P, N). Returns y and the new state."""
    wide = state.dtype
    group = x.shape[1] // B.shape[1]
    B_head, C_head = (tensor.to(wide).repeat_interleave(group, dim=1) for tensor in (B, C))  # (B, H, N)
    x_wide, dt_wide = x.to(wide), dt.to(wide)
    decay = (dt_wide * A.to(wide)).exp().view(*dt.shape, 1, 1)
    state = state * decay + (dt_wide.unsqueeze(-1) * x_wide).unsqueeze(-1) * B_head.unsqueeze(2)
    y = (state @ C_head.unsqueeze(-1)).squeeze(-1) + D.to(wide).view(-1, 1) * x_wide
    return y.to(x.dtype), state


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *, initial_state: Tensor | None = None, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """Mamba-2's scan. Returns y (B, T, H, P) in x's dtype and the final state (B, H, P, N) in at least fp32.

    x: (B, T, H, P); dt: (B, T, H), after softplus and bias; A: (H,), negative; B, C: (B, T, G, N), head h reading group
    ``h // (H / G)``; D: (H,); initial_state: (B, H, P, N), zeros if None. ``chunk`` changes speed, not results.
    """
    if x.shape[1] == 1 and initial_state is not None:
        y, state = ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, initial_state.to(at_least_fp32(x.dtype)))
        return y.unsqueeze(1), state
    y, states = _ssd(x, dt, A, B, C, D, initial_state, min(chunk, x.shape[1]))
    return y.to(x.dtype), states[:, -1].permute(0, 2, 3, 1)
