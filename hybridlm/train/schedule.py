"""The learning rate as a function of the optimizer step."""

from __future__ import annotations

import math

from hybridlm.config.optim import OptimConfig
from hybridlm.config.steps import span


def lr_factor(step: int, config: OptimConfig, max_steps: int) -> float:
    """The factor on the peak rate at 0-based ``step``: linear warm-up, then from 1 to ``final_lr`` along the schedule's
    curve.

    "wsd" stays at 1 until the last ``decay`` steps, over which it falls as 1 - sqrt(progress), which reached a lower
    loss than a linear decay in Hägele et al. 2024 (arXiv 2405.18392). A run resumed with more steps continues at the
    stable rate.
    """
    warmup = span(config.warmup, max_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    falls = max_steps - span(config.decay, max_steps) if config.schedule == "wsd" else warmup
    progress = min(1.0, max(0, step - falls) / max(1, max_steps - falls))
    match config.schedule:
        case "constant":
            return 1.0
        case "linear":
            shape = 1 - progress
        case "cosine":
            shape = 0.5 * (1 + math.cos(math.pi * progress))
        case "wsd":
            shape = 1 - math.sqrt(progress)
    return config.final_lr + (1 - config.final_lr) * shape
