"""Mamba-1's recurrence token by token, and what the tests of the scan feed to both."""

from __future__ import annotations

import torch
from torch import Tensor

NAMES = ("x", "dt", "A", "B", "C", "D", "initial_state")
TIMED = ("x", "dt", "B", "C")
BATCH, CHANNELS, STATE = 3, 6, 4


def token_loop(x, dt, A, B, C, D, initial_state=None, starts=None) -> tuple[Tensor, Tensor]:
    """The equations, one token after another; autograd differentiates them."""
    state = x.new_zeros(len(x), *A.shape) if initial_state is None else initial_state
    outputs = []
    for t in range(x.shape[1]):
        if starts is not None:
            state = torch.where(starts[:, t, None, None], torch.zeros_like(state), state)
        decay = torch.exp(dt[:, t, :, None] * A)
        state = decay * state + (dt[:, t] * x[:, t])[:, :, None] * B[:, t, None, :]
        outputs.append((state * C[:, t, None, :]).sum(-1) + D * x[:, t])
    return torch.stack(outputs, 1), state


def make_inputs(time: int, batch: int = BATCH, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return {
        "x": randn(batch, time, CHANNELS),
        "dt": torch.nn.functional.softplus(randn(batch, time, CHANNELS) - 1),
        "A": -torch.exp(2 * randn(CHANNELS, STATE)),
        "B": randn(batch, time, STATE),
        "C": randn(batch, time, STATE),
        "D": randn(CHANNELS),
        "initial_state": randn(batch, CHANNELS, STATE),
        "dy": randn(batch, time, CHANNELS),
        "dstate": randn(batch, CHANNELS, STATE),
    }


def run(scan, inputs: dict[str, Tensor], **settings) -> dict[str, Tensor]:
    """y, the final state, and the gradient of every input that is given, under ``sum(y dy) + sum(state dstate)``."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in NAMES if name in inputs}
    y, state = scan(**leaves, **settings)
    loss = (y.double() * inputs["dy"]).sum() + (state.double() * inputs["dstate"]).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return {"y": y, "state": state} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
