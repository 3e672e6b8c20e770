"""The gated delta rule token by token, from its equations: gated DeltaNet with one decay per head, Kimi Delta Attention
with one per channel of the keys."""

from __future__ import annotations

import torch
from torch import Tensor


def gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    initial_state: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q, k (B,T,Hk,Dk) of any length; v (B,T,H,Dv); log_decay (B,T,H) or (B,T,H,Dk); beta (B,T,H).

    Returns o (B,T,H,Dv) and the last state (B,H,Dk,Dv); a state is taken away where a document starts, whatever is in
    it.
    """
    batch, time, heads, _ = v.shape
    key_head = [h // (heads // k.shape[2]) for h in range(heads)]
    state = v.new_zeros(batch, heads, k.shape[3], v.shape[3]) if initial_state is None else initial_state
    outputs = []
    for t in range(time):
        query, key = (
            x[:, t, key_head] / torch.sqrt((x[:, t, key_head] ** 2).sum(-1, keepdim=True) + 1e-6) for x in (q, k)
        )
        alpha = torch.exp(log_decay[:, t])
        alpha = alpha[..., None, None] if log_decay.dim() == 3 else alpha[..., None]
        kept = alpha * state
        if starts is not None:
            kept = torch.where(starts[:, t, None, None, None], torch.zeros_like(kept), kept)
        foretold = (kept * key[..., None]).sum(-2)
        state = kept + key[..., None] * (beta[:, t, :, None] * (v[:, t] - foretold))[:, :, None, :]
        outputs.append((state * query[..., None]).sum(-2) / k.shape[3] ** 0.5)
    return torch.stack(outputs, dim=1), state
