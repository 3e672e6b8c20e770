"""Causal softmax attention over a prefix that may be longer than the queries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """Boolean (queries, keys) mask, True where attention is allowed; the last query sits on the last key.

    None where every query may see every key (a single query without a window that cuts).
    """
    if queries == 1 and (window is None or window >= keys):
        return None
    last = torch.arange(keys - queries, keys, device=device).unsqueeze(1)  # position of each query among the keys
    position = torch.arange(keys, device=device).unsqueeze(0)
    allowed = position <= last
    return allowed if window is None else allowed & (position > last - window)


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None = None) -> Tensor:
    """Grouped-query attention; query head h reads key/value head ``h // (H / H_kv)``.

    q: (B, T, H, P); k, v: (B, S, H_kv, P) with S >= T, the queries being the last T of the S positions. Returns (B, T, H, P).
    ``window`` counts the token itself.
    """
    queries, keys = q.shape[1], k.shape[1]
    group = q.shape[2] // k.shape[2]
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # (B, H, T, P)
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    plain = queries == keys and (window is None or window >= keys)
    mask = None if plain else causal_mask(queries, keys, window, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=plain and queries > 1, scale=scale).transpose(1, 2)
