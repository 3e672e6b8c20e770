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


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None = None, mask: Tensor | None = None
) -> Tensor:
    """Grouped-query attention; query head h reads key/value head ``h // (H / H_kv)``. The softmax is taken in at least
    fp32.

    q: (B, T, H, P); k: (B, S, H_kv, P), v: (B, S, H_kv, P_v) with S >= T, the queries being the last T of the S
    positions. Returns (B, T, H, P_v). ``window`` counts the token itself. mask: (B, 1, T, S), True where a query may
    look at a key, instead of all this.
    """
    queries, keys, width = q.shape[1], k.shape[1], q.shape[3]
    group = q.shape[2] // k.shape[2]
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # (B, H, T, P)
    if mask is None and queries == keys and (window is None or window >= keys):
        k, v = _per_head(k, group), _per_head(v, group)
        out: Tensor = F.scaled_dot_product_attention(
            q, k, v, is_causal=queries > 1, scale=scale, enable_gqa=k.shape[1] < q.shape[1]
        )
        return out.transpose(1, 2)
    if mask is None:
        mask = causal_mask(queries, keys, window, q.device)
    if group == 1 or queries >= width:
        k, v = _per_head(k, group), _per_head(v, group)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=k.shape[1] < q.shape[1])
        return out.transpose(1, 2)
    # A few queries after many keys: the heads of a group become queries of one head, which repeats the mask instead of
    # the keys.
    if mask is not None and queries > 1:
        mask = mask.unsqueeze(-3).expand(*mask.shape[:-2], group, queries, keys).flatten(-3, -2)
    q = q.unflatten(1, (-1, group)).flatten(2, 3)  # (B, H_kv, group T, P)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    out = out.unflatten(2, (group, queries)).flatten(1, 2)  # (B, H, T, P_v)
    return out.transpose(1, 2)


def _per_head(x: Tensor, group: int) -> Tensor:
    """(B, H_kv, S, P) as it is on a CPU, whose kernels share heads by themselves; elsewhere repeated to (B, H, S, P),
    because a shared head there would rule out the memory-efficient kernel, the only fast one that takes a mask or
    float32."""
    return x if group == 1 or not x.is_cuda else x.repeat_interleave(group, dim=1)
