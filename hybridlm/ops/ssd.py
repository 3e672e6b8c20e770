"""State-space duality: a scan with a scalar decay per head as matrix products over chunks (Dao & Gu 2024), its backward
by hand.

The recurrence, per head (x_t in R^P, B_t and C_t in R^N, state S in R^(P x N)), with a_t the logarithm of the decay:

    S_t = exp(a_t) S_{t-1} + scale_t x_t B_t^T          y_t = S_t C_t + D x_t

Mamba-2 has a = dt A and scale = dt.

Inside a chunk of Q tokens, with c_t the running sum of a, token s reaches token l > s with weight exp(c_l - c_s)
scale_s, so a chunk is one masked attention-like product plus what the incoming state contributes. Folding log(scale_s)
into the exponent saves a pass over x. Every exponent that counts is at most log(scale): nothing is divided by a product
that could underflow.

Where a document starts, everything before is dropped: running sums begin anew, the mask of the tile keeps to one
document, and so do the weights with which tokens reach the outgoing state and the incoming state reaches tokens.

In the backward every pair of tokens s < l gives the same amount to the gradient of c_l and, negative, of c_s; what a
token reads of the incoming state gives to that of c_l, what it adds to the outgoing state to those of the steps after
it. No y is needed, and what a token gives to itself, which has no decay in it, cannot round into the gradient of the
decays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridlm.ops.dispatch import autocast_off, called, differentiate, gradient_wanted, new_like
from hybridlm.ops.kernels.choice import CUDA, TORCH, Backend
from hybridlm.ops.kernels.rules import mamba2_refusal
from hybridlm.ops.norm import as_dtype, at_least_fp32
from hybridlm.ops.ssd_chunks import backward, cut, forward, into_chunks


@torch.library.custom_op("hybridlm::scan", mutates_args=())
def _scan(
    x: Tensor,
    log_decay: Tensor,
    scale: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial_state: Tensor | None,
    starts: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y (B, T, H, P), the state that comes into each chunk (B, chunks, N, H, P) and the final one (B, N, H, P),
    all wide."""
    with autocast_off(x):  # it would round the matrix products
        chunks = into_chunks(x, log_decay, scale, B, C, starts, chunk, backward=False)
        y, incoming, final = forward(chunks, D, initial_state, len(x))
    return _joined(y, x), incoming, final


def _joined(tensor: Tensor, like: Tensor) -> Tensor:
    """(B * chunks, chunk, ...) to (B, T, ...) without the last chunk's padding; ``like`` (B, T, ...)."""
    return tensor.reshape(like.shape[0], -1, *tensor.shape[2:])[:, : like.shape[1]].contiguous()


@_scan.register_fake
def _(
    x: Tensor, log_decay: Tensor, scale: Tensor, B: Tensor, C: Tensor, D: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, heads, head_dim = x.shape
    n_chunks, state = -(-length // others[-1]), (B.shape[3], heads, head_dim)
    shapes = x.shape, (batch, n_chunks, *state), (batch, *state)
    y, incoming, final = (x.new_empty(shape, dtype=at_least_fp32(x.dtype)) for shape in shapes)
    return y, incoming, final


@torch.library.custom_op("hybridlm::scan_backward", mutates_args=())
def _scan_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    log_decay: Tensor,
    scale: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    starts: Tensor | None,
    incoming: Tensor,
    chunk: int,
) -> list[Tensor]:
    """Gradients of x, log_decay, scale, B, C, D and the initial state (B, N, H, P)."""
    dtype = at_least_fp32(x.dtype)
    with autocast_off(x):
        chunks = into_chunks(x, log_decay, scale, B, C, starts, chunk, backward=True)
        in_chunks, dD, dinitial = backward(chunks, D, incoming, cut(dy, chunk, dtype), dfinal)
    paired = zip(in_chunks, (x, log_decay, scale, B, C), strict=True)
    return [*(_joined(grad, like).to(like.dtype) for grad, like in paired), dD.to(D.dtype), dinitial]


_scan_backward.register_fake(
    lambda dy, dfinal, x, log_decay, scale, B, C, D, starts, incoming, chunk: new_like(
        x, log_decay, scale, B, C, D, incoming[:, 0]
    )
)


# Nothing reads the incoming states: ``scan`` keeps them to itself.
differentiate(
    _scan,
    _scan_backward,
    "y incoming final",
    "x log_decay scale B C D initial_state",
    state=lambda grad: grad.permute(0, 2, 3, 1),
)


def scan_step(
    x: Tensor,
    log_decay: Tensor,
    scale: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor,
    *,
    starts: Tensor | None = None,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """``scan`` of one token after a state (B, H, P, N), which has the dtype to compute in.

    Without tiles, and in place where that may be, a token takes a quarter of the operator's time.
    """
    wide, (batch, _, groups, d_state), head_dim = state.dtype, B.shape, x.shape[3]
    x_wide = as_dtype(x, wide)
    decay = as_dtype(log_decay, wide).exp()
    if starts is not None:
        decay = decay.masked_fill(starts.unsqueeze(-1), 0.0)
    decay = decay.view(batch, -1, 1, 1)
    in_place = overwrite and not gradient_wanted(x, log_decay, scale, B, C, D, state)
    state = state.mul_(decay) if in_place else state * decay
    by_group = state.view(batch, groups, -1, head_dim, d_state)  # the heads of a group share its B and C
    written = as_dtype(scale, wide).view(batch, groups, -1, 1, 1) * x_wide.view(batch, groups, -1, head_dim, 1)
    by_group.addcmul_(written, as_dtype(B, wide).view(batch, groups, 1, 1, d_state))
    with autocast_off(x):
        y = torch.bmm(by_group.reshape(batch * groups, -1, d_state), as_dtype(C, wide).reshape(-1, d_state, 1)).view(
            x.shape
        )
    return as_dtype(y.addcmul_(as_dtype(D, wide).unsqueeze(-1), x_wide), x.dtype), state


def scan(
    x: Tensor,
    log_decay: Tensor,
    scale: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    initial_state: Tensor | None = None,
    starts: Tensor | None = None,
    chunk: int = 64,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """The recurrence of this module's docstring. Returns y (B, T, H, P) in x's dtype and the final state (B, H, P, N)
    in at least fp32.

    x: (B, T, H, P); log_decay: (B, T, H), at most 0; scale: (B, T, H), at least 0 (0 writes nothing); B, C: (B, T, G,
    N), head h reading group ``h // (H / G)``; D: (H,). initial_state: (B, H, P, N); None: zeros. starts: (B, T), True
    at a token before which everything is dropped, log_decay at that token included; None: nowhere. ``chunk`` changes
    speed, not results. ``overwrite``: the final state may be written over the initial one, which is done for one token
    of which no gradient is wanted.
    """
    if x.shape[1] == 1 and initial_state is not None:
        state = as_dtype(initial_state, at_least_fp32(x.dtype))
        return scan_step(x, log_decay, scale, B, C, D, state, starts=starts, overwrite=overwrite)
    y, _, state = called(_scan, x, log_decay, scale, B, C, D, initial_state, starts, min(chunk, x.shape[1]))
    return y.to(x.dtype), state.permute(0, 2, 3, 1)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    initial_state: Tensor | None = None,
    starts: Tensor | None = None,
    chunk: int = 64,
    overwrite: bool = False,
    backend: Backend = TORCH,
) -> tuple[Tensor, Tensor]:
    """Mamba-2's scan: ``scan`` with log_decay = dt A and scale = dt.

    dt: (B, T, H), after softplus and bias, 0 at padding; A: (H,), negative; the others, and what is returned, as in
    ``scan``. ``backend`` CUDA: the compiled kernel where it supports the call, but for a token decoded after a state.
    """
    if backend == CUDA and (x.shape[1] > 1 or initial_state is None) and mamba2_refusal(B.shape[3], x.dtype) is None:
        from hybridlm.ops.kernels.calls import kernel_ssd

        return kernel_ssd(x, dt, A, B, C, D, initial_state, starts)
    wide = at_least_fp32(x.dtype)
    dt = as_dtype(dt, wide)
    return scan(
        x,
        dt * as_dtype(A, wide),
        dt,
        B,
        C,
        D,
        initial_state=initial_state,
        starts=starts,
        chunk=chunk,
        overwrite=overwrite,
    )
