"""The scan of ``hybridlm.ops.ssd`` token by token, from its equations and with no code of the package."""

from __future__ import annotations

import torch
from torch import Tensor


def scan_loop(
    x: Tensor,
    log_decay: Tensor,
    scale: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    initial_state: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y (B, T, H, P) and the last state (B, H, P, N); a state is taken away where a document starts, whatever is in
    it."""
    batch, time, heads, width = x.shape
    group_of_head = [h // (heads // B.shape[2]) for h in range(heads)]
    state = x.new_zeros(batch, heads, width, B.shape[3]) if initial_state is None else initial_state
    outputs = []
    for t in range(time):
        b_t, c_t, x_t = B[:, t, group_of_head], C[:, t, group_of_head], x[:, t]
        kept = torch.exp(log_decay[:, t])[:, :, None, None] * state
        if starts is not None:
            kept = torch.where(starts[:, t, None, None, None], torch.zeros_like(kept), kept)
        state = kept + (scale[:, t, :, None] * x_t)[..., None] * b_t[:, :, None, :]
        outputs.append((state * c_t[:, :, None, :]).sum(-1) + D[:, None] * x_t)
    return torch.stack(outputs, dim=1), state
