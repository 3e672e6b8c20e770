"""Which experts each token goes to, and how evenly: top-k routing over softmax or sigmoid scores, its losses and its
counts.

Everything here is in the dtype of the logits, which the caller keeps in at least fp32: a rounded score changes which
expert is chosen.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_TINY = 1e-20  # keeps a sum of sigmoids that all underflowed from dividing by zero


class Routing(NamedTuple):
    """Where N tokens go."""

    experts: Tensor  # (N, k) integers, distinct within a row, in no particular order
    weights: Tensor  # (N, k) what each chosen expert's output is multiplied by
    probabilities: Tensor  # (N, E) each row sums to one; the balance loss is taken of them


def softmax_routing(logits: Tensor, top_k: int, *, normalize: bool, scale: float) -> Routing:
    """The k largest of ``softmax(logits)``; ``normalize`` divides their weights by their sum (Mixtral), or not (OLMoE).

    logits: (N, E). ``scale`` multiplies the weights.
    """
    probabilities = logits.softmax(-1)
    experts = logits.detach().topk(top_k, dim=-1, sorted=False).indices
    return Routing(experts, _weights(probabilities, experts, normalize, scale), probabilities)


def sigmoid_routing(
    logits: Tensor, bias: Tensor, top_k: int, *, normalize: bool, scale: float, groups: int = 1, kept_groups: int = 1
) -> Routing:
    """DeepSeek-V3's router (2024): the k largest of ``sigmoid(logits) + bias``; the weights come from the scores
    without the bias.

    logits: (N, E); bias: (E,), which only selects and gets no gradient. With ``groups`` above one a token may choose
    only within its ``kept_groups`` best groups of E / groups neighbouring experts; a group's score is the sum of its
    best two.
    """
    scores = logits.sigmoid()
    with torch.no_grad():
        selection = scores + bias.to(scores.dtype)
        if groups > 1:
            grouped = selection.unflatten(-1, (groups, -1))  # (N, groups, E / groups)
            best = grouped.topk(2, dim=-1).values.sum(-1).topk(kept_groups, dim=-1, sorted=False).indices
            dropped = torch.ones(grouped.shape[:2], dtype=torch.bool, device=logits.device).scatter_(1, best, False)
            selection = grouped.masked_fill(dropped.unsqueeze(-1), -torch.inf).flatten(1)
        experts = selection.topk(top_k, dim=-1, sorted=False).indices
    return Routing(
        experts, _weights(scores, experts, normalize, scale), scores / (scores.sum(-1, keepdim=True) + _TINY)
    )


def _weights(scores: Tensor, experts: Tensor, normalize: bool, scale: float) -> Tensor:
    weights = scores.gather(1, experts)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + _TINY)
    return weights if scale == 1.0 else weights * scale


def expert_counts(experts: Tensor, n_experts: int, valid: Tensor | None = None) -> Tensor:
    """Pairs of token and slot that each expert got: (E,) integers. experts: (N, k); valid: (N,), False where a token
    does not count."""
    pairs = torch.ones_like(experts) if valid is None else valid.unsqueeze(1).expand_as(experts).to(experts.dtype)
    # Not bincount, which waits for a GPU to tell its largest index.
    return experts.new_zeros(n_experts).scatter_add_(0, experts.flatten(), pairs.flatten())


def balance_loss(probabilities: Tensor, counts: Tensor, valid: Tensor | None = None) -> Tensor:
    """``E sum_e f_e P_e``, a scalar: f_e is expert e's share of all pairs, P_e its mean probability (Fedus et al.
    2021).

    It is 1 where all experts are used alike, whatever k, and up to E / k where the same k get everything. Only P is
    differentiated. probabilities: (N, E); counts: (E,), from ``expert_counts`` with the same ``valid`` (N,).
    """
    share = counts.to(probabilities.dtype) / counts.sum().clamp_min(1)
    return counts.numel() * (share * _mean(probabilities, valid)).sum()


def z_loss(logits: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean over tokens of ``logsumexp(logits)^2``, a scalar, which keeps logits from growing (ST-MoE, Zoph et al.
    2022). logits: (N, E)."""
    return _mean(logits.logsumexp(-1).square(), valid)


def _mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """Over the first axis, of valid tokens only; zero where there is none."""
    if valid is None:
        return values.mean(0)
    keep = valid.view(-1, *[1] * (values.dim() - 1))
    # Masked, not multiplied by zero: what stands at padding may be anything.
    return values.masked_fill(~keep, 0.0).sum(0) / valid.sum().clamp_min(1)
