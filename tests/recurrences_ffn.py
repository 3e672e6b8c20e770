"""The feed-forward networks: the dense one, and the mixture of experts token by token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from formulas import Params, below, sigmoid, silu
from torch import Tensor

from hybridlm.config.ffns.mlp import MLPSpec
from hybridlm.config.ffns.moe import MoESpec


class Routing(NamedTuple):
    """What a router did with N tokens: logits, chosen, weights by token; and its losses. ``hf_loss`` is k times
    ``balance_loss``."""

    logits: Tensor  # (N, E)
    chosen: list[list[int]]  # of each token, k experts
    weights: Tensor  # (N, k) that multiply the experts' outputs, in the order of ``chosen``
    balance_loss: Tensor
    hf_loss: Tensor
    z_loss: Tensor
    aux: Tensor
    counts: Tensor  # (E,)


def mlp(p: Params, x: Tensor, spec: MLPSpec) -> Tensor:
    if spec.activation == "swiglu":
        hidden = silu(x @ p["gate_proj.weight"].T) * (x @ p["up_proj.weight"].T)
    else:
        hidden = torch.clamp(x @ p["up_proj.weight"].T, min=0) ** 2
    return hidden @ p["down_proj.weight"].T


def choose(scores: Tensor, selection: Tensor, spec: MoESpec) -> tuple[list[int], Tensor]:
    """The experts of one token and their weights. scores (E,) become weights, ``selection`` (E,) only decides."""
    candidates = list(range(spec.n_experts))
    if spec.n_expert_groups > 1:
        size = spec.n_experts // spec.n_expert_groups
        groups = [list(range(g * size, (g + 1) * size)) for g in range(spec.n_expert_groups)]
        best_two = [sum(sorted((float(selection[e]) for e in group), reverse=True)[:2]) for group in groups]
        kept = sorted(range(len(groups)), key=best_two.__getitem__, reverse=True)[: spec.topk_groups]
        candidates = [e for g in kept for e in groups[g]]
    chosen = sorted(candidates, key=lambda e: float(selection[e]), reverse=True)[: spec.top_k]
    weights = scores[chosen]
    if spec.norm_topk_prob:
        weights = weights / (weights.sum() + (1e-20 if spec.router == "sigmoid" else 0))
    return chosen, spec.routed_scaling_factor * weights


def expert(p: Params, index: int, x: Tensor, spec: MoESpec) -> Tensor:
    """One routed expert on one token (D,)."""
    if spec.activation == "swiglu":
        gate, up = torch.split(p["experts.gate_up_proj"][index], spec.d_expert, dim=0)
        hidden = silu(gate @ x) * (up @ x)
    else:
        hidden = torch.clamp(p["experts.up_proj"][index] @ x, min=0) ** 2
    return p["experts.down_proj"][index] @ hidden


def moe(p: Params, x: Tensor, spec: MoESpec, valid: Tensor | None = None) -> tuple[Tensor, Routing]:
    """A mixture of experts on x (B,T,D). ``p`` may hold the selection bias ``gate.e_score_correction_bias`` (E,), zero
    where it does not.

    Where ``valid`` (B,T) is False there is no token: its output is zero here, and it is in no mean and no count.
    """
    bias = p.get("gate.e_score_correction_bias", x.new_zeros(spec.n_experts)).detach()
    shared = MLPSpec(spec.d_model, spec.d_shared, spec.activation)
    outputs, logits, shares, chosen, weights = [], [], [], [], []
    tokens = [True] * (x.shape[0] * x.shape[1]) if valid is None else valid.flatten().tolist()
    for token, is_token in zip(x.flatten(0, 1), tokens, strict=True):
        y = torch.zeros_like(token)
        if is_token:
            row = p["gate.weight"] @ token
            if spec.router == "softmax":
                scores = torch.exp(row - row.max().detach())
                scores = scores / scores.sum()
            else:
                scores = sigmoid(row)
            picked, factors = choose(scores, (scores + bias).detach(), spec)
            for index, factor in zip(picked, factors, strict=True):
                y = y + factor * expert(p, index, token, spec)
            if spec.d_shared:
                y = y + mlp(below(p, "shared_experts."), token, shared)
            logits.append(row)
            shares.append(scores / scores.sum())
            chosen.append(picked)
            weights.append(factors)
        outputs.append(y)
    return torch.stack(outputs).reshape(x.shape), routing(
        spec, torch.stack(logits), torch.stack(shares), chosen, torch.stack(weights)
    )


def routing(spec: MoESpec, logits: Tensor, shares: Tensor, chosen: list[list[int]], weights: Tensor) -> Routing:
    """The losses of N tokens' routing; ``shares`` (N, E) are the scores of each token divided by their sum."""
    counts = torch.tensor([sum(index in picked for picked in chosen) for index in range(spec.n_experts)])
    hf_loss = (
        spec.n_experts * (counts.to(shares.dtype) / len(chosen) * shares.mean(0)).sum()
    )  # whole numbers would divide in float32
    balance = hf_loss / spec.top_k
    peak = logits.max(1).values.detach()
    z_loss = ((torch.log(torch.exp(logits - peak[:, None]).sum(1)) + peak) ** 2).mean()
    aux = spec.balance_loss_weight * balance + spec.z_loss_weight * z_loss
    return Routing(logits, chosen, weights, balance, hf_loss, z_loss, aux, counts)
