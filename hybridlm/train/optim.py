"""One optimizer for Lightning: AdamW, or Muon for the matrices inside the blocks and AdamW for the rest; clipping is inside."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from hybridlm.train.muon import muon_updates

if TYPE_CHECKING:
    from hybridlm.config.train import OptimConfig
    from hybridlm.layers.init import ParamSpec


def param_groups(named: Iterable[tuple[str, nn.Parameter]], specs: dict[str, ParamSpec], config: OptimConfig) -> list[dict[str, Any]]:
    """One group per (role, decay), each with its algorithm, learning rate and decay. Every parameter is in exactly one; one without a
    declaration raises KeyError."""
    members: dict[tuple[str, bool], list[tuple[nn.Parameter, tuple[int, ...]]]] = {}
    for name, parameter in named:
        spec = specs[name]
        members.setdefault((spec.role, spec.decay), []).append((parameter, spec.row_blocks))
    groups = []
    for (role, decay), pairs in members.items():
        muon = config.name == "muon" and role == "matrix"
        groups.append(
            {
                "name": f"{role}{'' if decay else ', no decay'}",
                "algorithm": "muon" if muon else "adamw",
                "params": [parameter for parameter, _ in pairs],
                "row_blocks": [blocks for _, blocks in pairs],
                "lr": (config.muon.lr if muon else config.lr) * getattr(config.lr_scale, role),
                "weight_decay": config.weight_decay if decay else 0.0,
            }
        )
    return groups


class HybridOptimizer(torch.optim.Optimizer):
    """Clips the global gradient norm, then updates each group by its algorithm.

    Lightning refuses its own clipping with a fused optimizer under mixed precision. Here gradients are complete when ``step`` sees them
    and, since this class does not claim to handle loss scaling, unscaled.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig) -> None:
        super().__init__(groups, {})
        self._config = config
        self.grad_norm: Tensor | None = None  # before clipping, of the last step
        self.used_lr = 0.0  # of AdamW in the last step; the schedule has moved on when others look

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._clip()
        self.used_lr = max(group["lr"] for group in self.param_groups if group["algorithm"] == "adamw")
        for group in self.param_groups:
            (self._muon if group["algorithm"] == "muon" else self._adamw)(group)
        return loss

    def _clip(self) -> None:
        parameters = [parameter for group in self.param_groups for parameter in group["params"] if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        self.grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if self._config.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._config.clip, self.grad_norm)

    def _adamw(self, group: dict[str, Any]) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] |= {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        if not parameters:
            return
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=not isinstance(parameters[0], DTensor),
            amsgrad=False,
            beta1=self._config.betas[0],
            beta2=self._config.betas[1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=self._config.eps,
            maximize=False,
        )

    def _muon(self, group: dict[str, Any]) -> None:
        momentum = self._config.muon.momentum
        chosen = [
            (parameter, blocks)
            for parameter, blocks in zip(group["params"], group["row_blocks"], strict=True)
            if parameter.grad is not None
        ]
        updates = []
        for parameter, _ in chosen:
            buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
            buffer.lerp_(parameter.grad, 1 - momentum)
            updates.append(parameter.grad.lerp(buffer, momentum))  # Nesterov
        orthogonal = muon_updates(updates, [blocks for _, blocks in chosen], self._config.muon.ns_steps)
        for (parameter, _), update in zip(chosen, orthogonal, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
