"""AdamW with 8-bit moments, from bitsandbytes (Dettmers et al. 2022, arXiv 2110.02861): 2 bytes of state per weight
instead of 8."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from hybridlm.config.hardware import optimizer_problem
from hybridlm.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from hybridlm.config.optim import OptimConfig

# bitsandbytes' own: numbers that share a scale, and the size below which a tensor's state stays in float32.
_BLOCK, _LEAST = 256, 4096


def refuse_missing_kernels(config: OptimConfig, device: str) -> None:
    """Raise ConfigError where ``config`` names 8-bit moments and ``device`` or the environment has no kernels for
    them."""
    if (problem := optimizer_problem(config.name, device)) is not None:
        raise ConfigError(problem)
    if config.name == "adamw8bit" and find_spec("bitsandbytes") is None:
        raise ConfigError(
            "optim.name = 'adamw8bit': needs the package bitsandbytes (pip install bitsandbytes), or use adamw"
        )


class EightBit:
    """bitsandbytes' optimizer inside ours, which owns the states and the learning rates."""

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig) -> None:
        import bitsandbytes

        self._inner = bitsandbytes.optim.AdamW8bit(
            [{"params": group["params"]} for group in groups], lr=0.0, betas=config.betas, eps=config.eps
        )

    def step(self, groups: list[dict[str, Any]], state: Any, scale: float) -> None:
        """``groups`` in the constructor's order, whose rates ``scale`` multiplies; ``state``: the outer optimizer's."""
        self._inner.state = state
        for inner, group in zip(self._inner.param_groups, groups, strict=True):
            inner["lr"], inner["weight_decay"] = group["lr"] * scale, group["weight_decay"]
        self._inner.step()


def eight_bit_state_bytes(weight: Tensor) -> int:
    """Bytes of the state that bitsandbytes 0.45 keeps for ``weight`` (``Optimizer2State.init_state``): two moments of
    one byte, with a float32 scale per block of 256; tensors below 4,096 numbers keep float32 moments."""
    numbers = weight.numel()
    return 2 * (numbers + 4 * -(-numbers // _BLOCK)) if numbers >= _LEAST else 2 * 4 * numbers
