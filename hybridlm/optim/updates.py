"""The update rule of each algorithm. A rule gets weights, gradients and states in at least fp32 and changes weights and
states in place.

Weight decay is decoupled in all of them: ``w -= lr * decay * w`` beside the update (Loshchilov & Hutter 2019).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.adamw import adamw as torch_adamw
from torch.optim.sgd import sgd as torch_sgd

from hybridlm.optim.muon import muon_updates

if TYPE_CHECKING:
    from hybridlm.config.optim import OptimConfig

State = dict[str, Tensor]
_AT_ONCE = 2**25  # numbers in the matrices that Muon updates together, 128 MiB in float32


@dataclass(frozen=True)
class Rates:
    """Of one group in one step."""

    lr: float
    weight_decay: float


Rule = Callable[[list[Tensor], list[Tensor], list[State], list[tuple[int, ...]], Rates, "OptimConfig"], None]


def _adamw(
    weights: list[Tensor],
    gradients: list[Tensor],
    states: list[State],
    blocks: list[tuple[int, ...]],
    rates: Rates,
    config: OptimConfig,
) -> None:
    torch_adamw(
        weights,
        gradients,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        fused=not isinstance(weights[0], DTensor),
        amsgrad=False,
        beta1=config.betas[0],
        beta2=config.betas[1],
        lr=rates.lr,
        weight_decay=rates.weight_decay,
        eps=config.eps,
        maximize=False,
    )


def _lion(
    weights: list[Tensor],
    gradients: list[Tensor],
    states: list[State],
    blocks: list[tuple[int, ...]],
    rates: Rates,
    config: OptimConfig,
) -> None:
    """The weights move by the sign of a short average, a longer one is kept (Chen et al. 2023, arXiv 2302.06675)."""
    for weight, gradient, state in zip(weights, gradients, states, strict=True):
        direction = gradient.lerp(state["exp_avg"], config.betas[0]).sign_()
        weight.mul_(1 - rates.lr * rates.weight_decay).add_(direction, alpha=-rates.lr)
        state["exp_avg"].lerp_(gradient, 1 - config.betas[1])


def _sgd(
    weights: list[Tensor],
    gradients: list[Tensor],
    states: list[State],
    blocks: list[tuple[int, ...]],
    rates: Rates,
    config: OptimConfig,
) -> None:
    for weight in weights:
        weight.mul_(1 - rates.lr * rates.weight_decay)
    torch_sgd(
        weights,
        gradients,
        [state["momentum"] for state in states],
        weight_decay=0.0,
        momentum=config.sgd.momentum,
        lr=rates.lr,
        dampening=0.0,
        nesterov=config.sgd.nesterov,
        maximize=False,
    )


def _muon(
    weights: list[Tensor],
    gradients: list[Tensor],
    states: list[State],
    blocks: list[tuple[int, ...]],
    rates: Rates,
    config: OptimConfig,
) -> None:
    """A sharded matrix is gathered, orthogonalised on every rank, and each rank keeps its own rows of the result."""
    momentum = config.muon.momentum
    updates = []
    for gradient, state in zip(gradients, states, strict=True):
        state["momentum"].lerp_(gradient, 1 - momentum)
        update = gradient.lerp(state["momentum"], momentum)  # Nesterov
        updates.append(update.full_tensor() if isinstance(update, DTensor) else update)
    for weight, update in zip(weights, muon_updates(updates, blocks, config.muon.ns_steps), strict=True):
        if isinstance(weight, DTensor):  # every rank has the same full matrix: nothing is sent
            update = distribute_tensor(update, weight.device_mesh, weight.placements, src_data_rank=None)
        weight.mul_(1 - rates.lr * rates.weight_decay).add_(update, alpha=-rates.lr)


# Each rule with the states that it keeps per weight, in the weight's shape.
RULES: dict[str, tuple[Rule, tuple[str, ...]]] = {
    "adamw": (_adamw, ("exp_avg", "exp_avg_sq")),
    "lion": (_lion, ("exp_avg",)),
    "sgd": (_sgd, ("momentum",)),
    "muon": (_muon, ("momentum",)),
}


def wide_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of a weight's update and state: at least fp32."""
    return torch.promote_types(weight.dtype, torch.float32)


def fresh_state(algorithm: str, weight: Tensor) -> State:
    """Zeros for ``weight``; AdamW also counts its steps per weight."""
    state: State = {"step": torch.zeros((), dtype=torch.float32, device=weight.device)} if algorithm == "adamw" else {}
    return state | {name: torch.zeros_like(weight, dtype=wide_dtype(weight)) for name in RULES[algorithm][1]}


def _together(weights: list[Tensor]) -> list[list[int]]:
    """Indices of the weights that Muon updates together: by shape, in parts of about ``_AT_ONCE`` numbers, so that its
    copies do not double a large model's memory."""
    parts: list[list[int]] = [[]]
    numbers = 0
    for i in sorted(range(len(weights)), key=lambda i: tuple(weights[i].shape)):
        if parts[-1] and numbers + weights[i].numel() > _AT_ONCE:
            parts.append([])
            numbers = 0
        parts[-1].append(i)
        numbers += weights[i].numel()
    return [sorted(part) for part in parts]


def apply_rule(
    algorithm: str,
    weights: list[Tensor],
    gradients: list[Tensor],
    states: list[State],
    blocks: list[tuple[int, ...]],
    rates: Rates,
    config: OptimConfig,
) -> None:
    """Updates the weights of a group. Weights below fp32 are widened, updated and rounded to nearest.

    Muon takes matrices of the same shape together; for the others wide copies are made one by one, so that only one
    exists at a time.
    """
    rule = RULES[algorithm][0]
    narrow = any(weight.dtype != wide_dtype(weight) for weight in weights)
    everything = list(range(len(weights)))
    for places in _together(weights) if algorithm == "muon" else [[i] for i in everything] if narrow else [everything]:
        wide = [weights[i].to(wide_dtype(weights[i])) for i in places]
        slopes = [gradients[i].to(wide_dtype(weights[i])) for i in places]
        rule(wide, slopes, [states[i] for i in places], [blocks[i] for i in places], rates, config)
        for i, result in zip(places, wide, strict=True):
            weights[i].copy_(result)
