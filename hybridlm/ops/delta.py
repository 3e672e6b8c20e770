"""The gated delta rule (Yang et al. 2024), also with a decay per key channel (Kimi Delta Attention, 2025), its backward
by hand.

Per value head, with k_t the key and q_t the query of its group, each over the root of its squared length + 1e-6, q_t
also over sqrt(Dk), a_t = log_decay, a number or one for each key channel, and the state S in R^(Dk x Dv):

    S~_t = diag(exp(a_t)) S_{t-1}        S_t = S~_t + k_t (beta_t (v_t - S~_t^T k_t))^T        o_t = S_t^T q_t

The state predicts v_t from k_t, and what it missed is written with weight beta_t. An eigenvalue of the step is 1 -
beta_t, negative if beta_t > 1. Where a document starts the state is zero. The chunked form is in ``delta_chunks.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hybridlm.ops.delta_backward import backward
from hybridlm.ops.delta_chunks import EPS, Inputs, cut, forward, heads_first
from hybridlm.ops.dispatch import autocast_off, called, differentiate, gradient_wanted, new_like
from hybridlm.ops.norm import as_dtype, at_least_fp32

_PART = 1 << 17  # numbers in the keys or values of a part, at most, if it holds more than one chunk of one row


def chunk_of(chunk: int, length: int) -> int:
    """A text that is shorter than a chunk makes one of the next power of two."""
    return min(chunk, 1 << (length - 1).bit_length())


def _parts(v: Tensor, key_dim: int, chunk: int) -> Iterator[tuple[slice, list[tuple[slice, slice]]]]:
    """Some rows, and their tokens a few chunks at a time in the order of time: of each part the chunks and the tokens.

    Parts that stay in cache are faster on a CPU, and their temporary memory is used again instead of being given back
    and cleared anew. On a GPU small parts would wait for their launches.
    """
    batch, length, heads, width = v.shape
    limit = _PART if v.is_cpu else 16 * _PART
    n_chunks, each = -(-length // chunk), max(1, limit // (heads * chunk * max(key_dim, width)))
    per_part = max(1, each // batch)
    cuts = range(0, n_chunks, per_part)
    times = [(slice(c, c + per_part), slice(c * chunk, (c + per_part) * chunk)) for c in cuts]
    return ((slice(row, row + each), times) for row in range(0, batch, each))


def _fill(target: Tensor, rows: slice, tokens: slice, tensor: Tensor) -> None:
    """Puts (chunks, B, H, C, ...) where it belongs in (B, T, H, ...), without the last chunk's padding."""
    place, tensor = target[rows, tokens], tensor.transpose(2, 3).transpose(0, 1)
    if place.shape[1] == tensor.shape[1] * tensor.shape[2]:
        place.unflatten(1, tensor.shape[1:3]).copy_(tensor)
    else:  # flattened it is a copy of its own
        place.copy_(tensor.flatten(1, 2)[:, : place.shape[1]])


@torch.library.custom_op("hybridlm::gated_delta", mutates_args=())
def _gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    starts: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns o (B, T, H, Dv), the state that comes into each chunk (chunks, B, H, Dk, Dv) and the final one (B, H, Dk,
    Dv), both wide."""
    inputs, size = Inputs(q, k, v, log_decay, beta, starts), chunk_of(chunk, v.shape[1])
    batch, length, heads, width = v.shape
    o = v.new_empty(v.shape)
    states = v.new_empty((-(-length // chunk), batch, heads, k.shape[3], width), dtype=at_least_fp32(v.dtype))
    states[0] = 0.0 if initial_state is None else initial_state
    final = torch.empty_like(states[0])
    with autocast_off(v):  # it would round the matrix products
        for rows, times in _parts(v, k.shape[3], size):
            through = [state[rows].flatten(0, 1) for state in (*states, final)]
            for some, tokens in times:
                chunks = cut(inputs.part(rows, tokens), size)
                part = forward(chunks, through[some.start : some.stop + 1])
                _fill(o, rows, tokens, part.unflatten(0, (-1, chunks.rows // heads, heads)))
    return o, states, final


@_gated_delta.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, heads, width = v.shape
    state, wide = (batch, heads, k.shape[3], width), at_least_fp32(v.dtype)
    n_chunks = -(-length // others[-1])
    return v.new_empty(v.shape), v.new_empty((n_chunks, *state), dtype=wide), v.new_empty(state, dtype=wide)


@torch.library.custom_op("hybridlm::gated_delta_backward", mutates_args=())
def _gated_delta_backward(
    do: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    starts: Tensor | None,
    incoming: Tensor,
    chunk: int,
) -> list[Tensor]:
    """Gradients of q, k, v, log_decay, beta and the initial state (B, H, Dk, Dv)."""
    inputs, size = Inputs(q, k, v, log_decay, beta, starts), chunk_of(chunk, v.shape[1])
    grads = [tensor.new_empty(tensor.shape) for tensor in (q, k, v, log_decay, beta)]
    dstates = torch.zeros_like(incoming[0]) if dfinal is None else dfinal.clone(memory_format=torch.contiguous_format)
    with autocast_off(v):
        for rows, times in _parts(v, k.shape[3], size):
            for some, tokens in reversed(times):
                chunks = cut(inputs.part(rows, tokens), size)
                do_part = heads_first(do[rows, tokens], size, chunks.v.dtype)
                part = backward(chunks, incoming[some, rows].flatten(0, 2), do_part, dstates[rows].flatten(0, 1))
                dv, dsteps, dbeta = (grad.unflatten(0, (-1, *dstates[rows].shape[:2])) for grad in part[1:4])
                dsteps = dsteps.squeeze(-1) if log_decay.dim() == 3 else dsteps
                for target, grad in zip(grads, (*part.kq.unbind(3)[::-1], dv, dsteps, dbeta.squeeze(-1)), strict=True):
                    _fill(target, rows, tokens, grad)
                dstates[rows] = part.state.view(dstates[rows].shape)
    return [*grads, dstates]


_gated_delta_backward.register_fake(
    lambda do, dfinal, q, k, v, log_decay, beta, starts, incoming, chunk: new_like(
        q, k, v, log_decay, beta, incoming[0]
    )
)
# Nothing reads the incoming states: ``gated_delta`` keeps them to itself.
differentiate(_gated_delta, _gated_delta_backward, "o incoming final", "q k v log_decay beta initial_state")


def _unit(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Keys or queries of one token (B, 1, Hk, Dk) at unit length, for each value head: (B, H, Dk)."""
    x = as_dtype(x[:, 0], dtype)
    x = x * x.square().sum(-1, keepdim=True).add(EPS).rsqrt()
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor,
    starts: Tensor | None,
    overwrite: bool,
) -> tuple[Tensor, Tensor]:
    """One token after a state that has the dtype to compute in: the recurrence as it stands."""
    wide, heads = state.dtype, v.shape[2]
    decay = as_dtype(log_decay, wide)[:, 0].exp()
    if starts is not None:
        decay = decay.masked_fill(starts.view(-1, *(1,) * (decay.dim() - 1)), 0.0)
    decay = decay.view(*state.shape[:2], -1, 1)
    in_place = overwrite and not gradient_wanted(q, k, v, log_decay, beta, state)
    state = state.mul_(decay) if in_place else state * decay
    key, query = _unit(k, heads, wide).unsqueeze(-1), _unit(q, heads, wide).unsqueeze(-2)
    with autocast_off(v):
        missed = as_dtype(v[:, 0], wide).unsqueeze(-2) - key.transpose(-1, -2) @ state
        written = missed * as_dtype(beta, wide).view(*state.shape[:2], 1, 1)
        state = state.addcmul_(key, written) if in_place else state.addcmul(key, written)
        o = (query * k.shape[3] ** -0.5) @ state
    return as_dtype(o, v.dtype).view(v.shape), state


def gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    initial_state: Tensor | None = None,
    starts: Tensor | None = None,
    chunk: int = 32,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """The recurrence of this module's docstring. Returns o (B, T, H, Dv) in v's dtype and the final state (B, H, Dk,
    Dv), at least fp32.

    q, k: (B, T, Hk, Dk), of any length, value head h reading key head ``h // (H / Hk)``; v: (B, T, H, Dv); log_decay,
    at most 0: (B, T, H), or (B, T, H, Dk) with one for each key channel; beta: (B, T, H). Where both are 0 the state
    stays as it is. initial_state: (B, H, Dk, Dv); None: zeros. starts: (B, T), True at a token before which everything
    is dropped, log_decay at that token included; None: nowhere. ``chunk``, a power of two, changes speed, not results.
    ``overwrite``: the final state may be written over the initial one, which is done for one token of which no gradient
    is wanted.
    """
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f"chunk={chunk} is not a power of two")
    if v.shape[1] == 1 and initial_state is not None:
        state = as_dtype(initial_state, at_least_fp32(v.dtype))
        return _step(q, k, v, log_decay, beta, state, starts, overwrite)
    o, _, final = called(_gated_delta, q, k, v, log_decay, beta, initial_state, starts, chunk)
    return o, final
