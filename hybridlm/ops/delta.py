"""The gated delta rule (Yang et al. 2024), also with a decay per key channel (Kimi Delta Attention, 2025), its backward by hand.

Per value head, with k_t the key and q_t the query of its group, each over the root of its squared length + 1e-6, q_t also over sqrt(Dk),
a_t = log_decay, a number or one for each key channel, and the state S in R^(Dk x Dv):

    S~_t = diag(exp(a_t)) S_{t-1}        S_t = S~_t + k_t (beta_t (v_t - S~_t^T k_t))^T        o_t = S_t^T q_t

The state foretells v_t from k_t, and what it missed is written with weight beta_t. An eigenvalue of the step is 1 - beta_t, negative if
beta_t > 1. Where a document starts the state is zero. The chunked form is in ``delta_chunks.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm.ops.delta_backward import backward
from hybridlm.ops.delta_chunks import EPS, cut, forward, heads_first
from hybridlm.ops.modes import autocast_off, called, gradient_wanted
from hybridlm.ops.norm import as_dtype, at_least_fp32


def _joined(tensor: Tensor, like: Tensor) -> Tensor:
    """(chunks, B, H, C, ...) to (B, T, H, ...) in the dtype of ``like``, without the last chunk's padding."""
    return tensor.transpose(2, 3).transpose(0, 1).flatten(1, 2)[:, : like.shape[1]].to(like.dtype).contiguous()


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
    """Returns o (B, T, H, Dv), the state that comes into each chunk (chunks, B, H, Dk, Dv) and the final one (B, H, Dk, Dv), both wide."""
    batch, _, heads, _ = v.shape
    with autocast_off(v):  # it would round the matrix products
        chunks = cut(q, k, v, log_decay, beta, starts, chunk)
        state = None if initial_state is None else initial_state.to(chunks.v.dtype).flatten(0, 1)
        o, incoming, final = (tensor.unflatten(0, (-1, batch, heads)) for tensor in forward(chunks, state))
    return _joined(o, v), incoming, final[0]


@_gated_delta.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    starts: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, heads, width = v.shape
    state, wide = (batch, heads, k.shape[3], width), at_least_fp32(v.dtype)
    return v.new_empty(v.shape), v.new_empty(((length + chunk - 1) // chunk, *state), dtype=wide), v.new_empty(state, dtype=wide)


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
    with autocast_off(v):
        chunks = cut(q, k, v, log_decay, beta, starts, chunk)
        do = heads_first(do, chunks.v.shape[1], chunks.v.dtype).flatten(0, 2)
        dstate = None if dfinal is None else dfinal.flatten(0, 1)
        grads = backward(chunks, incoming.flatten(0, 2), do, dstate)
    dk, dq = grads.kq.unbind(3)
    dv, dbeta, dsteps = (grad.unflatten(0, (-1, len(v), v.shape[2])) for grad in (grads.v, grads.beta, grads.log_decay))
    if log_decay.dim() == 3:
        dsteps = dsteps.squeeze(-1)
    in_chunks = [(dq, q), (dk, k), (dv, v), (dsteps, log_decay), (dbeta.squeeze(-1), beta)]
    return [*(_joined(grad, like) for grad, like in in_chunks), grads.initial_state.view(incoming.shape[1:])]


@_gated_delta_backward.register_fake
def _(
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
    return [tensor.new_empty(tensor.shape) for tensor in (q, k, v, log_decay, beta, incoming[0])]  # contiguous, as the real ones are


def _setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, initial_state, starts, chunk = inputs
    ctx.save_for_backward(*tensors, starts, output[1])  # type: ignore[arg-type]
    ctx.set_materialize_grads(False)
    ctx.chunk = chunk  # type: ignore[attr-defined]
    ctx.initial_dtype = initial_state.dtype if isinstance(initial_state, Tensor) else None  # type: ignore[attr-defined]


def _backward(
    ctx: torch.autograd.function.FunctionCtx, do: Tensor | None, dincoming: None, dfinal: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Nothing reads the incoming states: ``gated_delta`` keeps them to itself."""
    saved = ctx.saved_tensors  # type: ignore[attr-defined]  # read once: activation checkpointing recomputes them
    do = torch.zeros_like(saved[2]) if do is None else do.contiguous()
    *grads, dinitial = _gated_delta_backward(do, dfinal, *saved, ctx.chunk)  # type: ignore[attr-defined]
    dtype = ctx.initial_dtype  # type: ignore[attr-defined]
    return (*grads, None if dtype is None else dinitial.to(dtype), None, None)


_gated_delta.register_autograd(_backward, setup_context=_setup)


def _unit(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Keys or queries of one token (B, 1, Hk, Dk) at unit length, for each value head: (B, H, Dk)."""
    x = as_dtype(x[:, 0], dtype)
    x = x * x.square().sum(-1, keepdim=True).add(EPS).rsqrt()
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, starts: Tensor | None, overwrite: bool
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
    chunk: int = 64,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """The recurrence of this module's docstring. Returns o (B, T, H, Dv) in v's dtype and the final state (B, H, Dk, Dv), at least fp32.

    q, k: (B, T, Hk, Dk), of any length, value head h reading key head ``h // (H / Hk)``; v: (B, T, H, Dv); log_decay, at most 0:
    (B, T, H), or (B, T, H, Dk) with one for each key channel; beta: (B, T, H). Where both are 0 the state stays as it is.
    initial_state: (B, H, Dk, Dv); None: zeros. starts: (B, T), True at a token before which everything is dropped, log_decay at that
    token included; None: nowhere. ``chunk``, a power of two, changes speed, not results. ``overwrite``: the final state may be
    written over the initial one, which is done for one token of which no gradient is wanted.
    """
    if v.shape[1] == 1 and initial_state is not None:
        state = as_dtype(initial_state, at_least_fp32(v.dtype))
        return _step(q, k, v, log_decay, beta, state, starts, overwrite)
    o, _, final = called(_gated_delta, q, k, v, log_decay, beta, initial_state, starts, chunk)
    return o, final
