"""The learning rate as a function of the optimizer step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hybridlm.config.train import OptimConfig


def warmup_steps(config: OptimConfig, max_steps: int) -> int:
    """Steps of linear warm-up; a number below 1 is a share of all steps."""
    return round(config.warmup * max_steps) if config.warmup < 1 else int(config.warmup)


def lr_factor(step: int, config: OptimConfig, max_steps: int) -> float:
    """The factor on the peak rate at 0-based ``step``: linear warm-up, then from 1 to ``final_lr`` along the schedule's curve."""
    warmup = warmup_steps(config, max_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, max_steps - warmup))
    match config.schedule:
        case "constant":
            return 1.0
        case "linear":
            shape = 1 - progress
        case "cosine":
            shape = 0.5 * (1 + math.cos(math.pi * progress))
    return config.final_lr + (1 - config.final_lr) * shape
