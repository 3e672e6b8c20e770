"""Mamba-1's selective scan (Gu & Dao 2023), chunked and exact, with a hand-written backward that recomputes the states.

The recurrence, for channel e and state n (E channels of N states each):

    h_t[e, n] = exp(dt_t[e] A[e, n]) h_{t-1}[e, n] + dt_t[e] x_t[e] B_t[n]          y_t[e] = sum_n h_t[e, n] C_t[n] +
    D[e] x_t[e]

Every state decays at its own rate, so a chunk is not a matrix product as in ops/ssd.py, but a loop over its positions
that advances many chunks at once (ops/selective_scan_blocks.py). Exponents are sums of dt A, at most 0, and nothing is
divided by a product of decays. Only the inputs and the states at chunk boundaries are saved for the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridlm.ops.dispatch import called, differentiate, new_like
from hybridlm.ops.kernels.choice import CUDA, TORCH, Backend
from hybridlm.ops.kernels.rules import mamba1_refusal
from hybridlm.ops.norm import at_least_fp32
from hybridlm.ops.selective_scan_blocks import backward, cut_inputs, forward


@torch.library.custom_op("hybridlm::selective_scan", mutates_args=())
def _scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial_state: Tensor | None,
    starts: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Returns y (B, T, E) and the states at every chunk boundary (B, chunks + 1, N, E), the initial one first; both
    wide."""
    y, states = forward(cut_inputs(x, dt, A, B, C, starts, chunk), D, initial_state)
    return _joined(y, x), states


def _joined(tensor: Tensor, like: Tensor) -> Tensor:
    """(B, chunks, Q, W) to (B, T, W) without the last chunk's padding; ``like`` (B, T, W)."""
    return tensor.flatten(1, 2)[:, : like.shape[1]].contiguous()


@_scan.register_fake
def _(x: Tensor, dt: Tensor, A: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    boundaries, wide = -(-x.shape[1] // others[-1]) + 1, at_least_fp32(x.dtype)
    return x.new_empty(x.shape, dtype=wide), x.new_empty((x.shape[0], boundaries, A.shape[1], A.shape[0]), dtype=wide)


@torch.library.custom_op("hybridlm::selective_scan_backward", mutates_args=())
def _scan_backward(
    dy: Tensor,
    dstates: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    starts: Tensor | None,
    states: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, D and the initial state (B, N, E)."""
    in_chunks, dA, dD, dinitial = backward(cut_inputs(x, dt, A, B, C, starts, chunk), A, D, states, dy, dstates)
    dx, ddt, dB, dC = (_joined(grad, like).to(like.dtype) for grad, like in zip(in_chunks, (x, dt, B, C), strict=True))
    return dx, ddt, dA.to(A.dtype).contiguous(), dB, dC, dD.to(D.dtype), dinitial.contiguous()


_scan_backward.register_fake(
    lambda dy, dstates, x, dt, A, B, C, D, starts, states, chunk: tuple(new_like(x, dt, A, B, C, D, states[:, 0]))
)


differentiate(_scan, _scan_backward, "y states", "x dt A B C D initial_state", state=lambda grad: grad.transpose(1, 2))


def _step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of the recurrence. x, dt: (B, E); B, C: (B, N); state: (B, E, N). Returns y (B, E) and the new state,
    both wide."""
    wide = state.dtype
    x, dt, B, C = (tensor.to(wide) for tensor in (x, dt, B, C))
    state = state * (dt.unsqueeze(-1) * A.to(wide)).exp() + (dt * x).unsqueeze(-1) * B.unsqueeze(1)
    return (state * C.unsqueeze(1)).sum(-1) + D.to(wide) * x, state


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    initial_state: Tensor | None = None,
    starts: Tensor | None = None,
    chunk: int = 16,
    backend: Backend = TORCH,
) -> tuple[Tensor, Tensor]:
    """Mamba-1's scan. Returns y (B, T, E) in x's dtype and the final state (B, E, N) in at least fp32.

    x: (B, T, E); dt: (B, T, E), after softplus, at least 0 (0 leaves the state untouched); A: (E, N), negative; B, C:
    (B, T, N); D: (E,). initial_state: (B, E, N); None: zeros. starts: (B, T), True at a token before which everything
    is dropped; None: nowhere. ``chunk`` changes speed and memory, not results. ``backend`` CUDA: the compiled kernel
    where it supports the call; its final state gives no gradient.
    """
    refusal = mamba1_refusal(A.shape[1], x.dtype, documents=starts is not None, state=initial_state is not None)
    if backend == CUDA and refusal is None:
        from hybridlm.ops.kernels.calls import kernel_selective_scan

        return kernel_selective_scan(x, dt, A, B, C, D)
    if x.shape[1] == 1 and initial_state is not None:
        state = initial_state.to(at_least_fp32(x.dtype))
        if starts is not None:
            state = state.masked_fill(starts.unsqueeze(-1), 0.0)
        y, state = _step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, state)
        return y.unsqueeze(1).to(x.dtype), state
    y, states = called(_scan, x, dt, A, B, C, D, initial_state, starts, min(chunk, x.shape[1]))
    return y.to(x.dtype), states[:, -1].transpose(1, 2)
