"""One optimizer for Lightning, whatever algorithm each parameter group uses; it also clips the gradient and refuses bad
steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hybridlm.optim.eight_bit import EightBit
from hybridlm.optim.updates import Rates, apply_rule, fresh_state, wide_dtype

if TYPE_CHECKING:
    from hybridlm.config.optim import OptimConfig
    from hybridlm.layers.init import ParamSpec
    from hybridlm.model.lm import HybridLM


def param_groups(
    named: Iterable[tuple[str, nn.Parameter]], specs: dict[str, ParamSpec], config: OptimConfig
) -> list[dict[str, Any]]:
    """One group per (role, decay), each with its algorithm, learning rate and weight decay. Every parameter is in
    exactly one; KeyError: one has no ``ParamSpec``."""
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
                "algorithm": "muon" if muon else "adamw" if config.name == "muon" else config.name,
                "params": [parameter for parameter, _ in pairs],
                "row_blocks": [blocks for _, blocks in pairs],
                "lr": (config.muon.lr if muon else config.lr) * getattr(config.lr_scale, role),
                "weight_decay": config.weight_decay if decay else 0.0,
            }
        )
    return groups


def model_groups(model: HybridLM, config: OptimConfig) -> list[dict[str, Any]]:
    """``param_groups`` of all parameters of ``model``."""
    return param_groups(model.named_parameters(), model.param_specs(), config)


def group_table(groups: Iterable[dict[str, Any]]) -> str:
    """The groups as text: name, algorithm, tensors, numbers in them, peak learning rate, decay."""
    rows = [("parameters", "algorithm", "tensors", "numbers", "peak lr", "decay")]
    for group in groups:
        numbers = sum(parameter.numel() for parameter in group["params"])
        rates = (f"{group['lr']:g}", f"{group['weight_decay']:g}")
        rows.append((group["name"], group["algorithm"], str(len(group["params"])), f"{numbers:,}", *rates))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = (str.ljust, str.ljust, str.rjust, str.rjust, str.rjust, str.rjust)
    return "\n".join(
        "  ".join(align(cell, width) for align, cell, width in zip(aligned, row, widths, strict=True)).rstrip()
        for row in rows
    )


class HybridOptimizer(torch.optim.Optimizer):
    """Computes the global gradient norm, clips, then updates each group by its algorithm.

    A step whose norm is not finite, or which ``veto`` refuses, changes neither weights nor states. The norm is taken
    over all ranks, so they agree without communicating. Reading it waits for the device once a step.

    Lightning refuses its own clipping with a fused optimizer under mixed precision. Here gradients are complete when
    ``step`` sees them and, since this class does not claim to handle loss scaling, unscaled. Moments are at least fp32,
    also those of bfloat16 weights.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig) -> None:
        super().__init__(groups, {})
        self._config = config
        self._eight_bit = EightBit(self.param_groups, config) if config.name == "adamw8bit" else None
        self.rate_scale = 1.0  # multiplies every group's learning rate; the guard lowers it
        # Called for a step with a finite norm; must return the same on every rank.
        self.veto: Callable[[], bool] | None = None
        self.grad_norm: Tensor | None = None  # before clipping, of the last step
        self.used_lr = 0.0  # of the last step, not Muon's; the schedule has moved on when it is read
        # Whether the last step was refused; the guard sets None before a step, which a loss scaler may skip.
        self.refused: bool | None = None
        self.skipped = 0  # steps refused in the whole run; the guard restores it on a resume

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = [
            parameter for group in self.param_groups for parameter in group["params"] if parameter.grad is not None
        ]
        self.grad_norm = total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        self.used_lr = self.rate_scale * max(group["lr"] for group in self.param_groups if group["algorithm"] != "muon")
        self.refused = not math.isfinite(float(self.grad_norm)) or (self.veto is not None and self.veto())
        if self.refused:
            self.skipped += 1
            return loss
        if self._config.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._config.clip, self.grad_norm)
        if self._eight_bit is not None:
            self._eight_bit.step(self.param_groups, self.state, self.rate_scale)
            return loss
        for group in self.param_groups:
            self._update(group)
        return loss

    def _update(self, group: dict[str, Any]) -> None:
        pairs = zip(group["params"], group["row_blocks"], strict=True)
        chosen = [(parameter, blocks) for parameter, blocks in pairs if parameter.grad is not None]
        if not chosen:
            return
        for parameter, _ in chosen:
            if not self.state[parameter]:
                self.state[parameter] |= fresh_state(group["algorithm"], parameter)
        apply_rule(
            group["algorithm"],
            [parameter for parameter, _ in chosen],
            [parameter.grad for parameter, _ in chosen],
            [self.state[parameter] for parameter, _ in chosen],
            [blocks for _, blocks in chosen],
            Rates(self.rate_scale * group["lr"], group["weight_decay"]),
            self._config,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, with two differences: what describes a group stays this run's (a checkpoint of shards loses part
        of it), and states keep their saved dtype, where torch would round the moments of bfloat16 weights."""
        own = [
            {name: group[name] for name in ("name", "algorithm", "row_blocks", "weight_decay")}
            for group in self.param_groups
        ]
        super().load_state_dict(state_dict)
        for group, facts in zip(self.param_groups, own, strict=True):
            group.update(facts)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor) and value.dtype != self.state[parameter][name].dtype:
                    self.state[parameter][name] = value.to(parameter.device, copy=True)


def total_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all gradients together, over all shards, computed in at least fp32."""
    narrow = [gradient for gradient in gradients if gradient.dtype != wide_dtype(gradient)]
    wide = [gradient for gradient in gradients if gradient.dtype == wide_dtype(gradient)]
    norm = torch.nn.utils.get_total_norm(wide)
    if narrow:
        norms = [torch.linalg.vector_norm(gradient, dtype=wide_dtype(gradient)) for gradient in narrow]
        norm = torch.linalg.vector_norm(torch.stack([norm, *norms]))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
