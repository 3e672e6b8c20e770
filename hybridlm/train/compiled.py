"""Blocks that torch compiles, each in place: the names of their parameters stay, and with them what checkpoints
hold."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch

from hybridlm.errors import ConfigError
from hybridlm.machine.device import CPU

if TYPE_CHECKING:
    from hybridlm.config.train import TrainerConfig
    from hybridlm.model.lm import HybridLM

# of a block's code: for each kind of layer, with and without gradients, for fixed and for changing lengths; torch takes
# 8
_VERSIONS = 64


def refuse_missing_compiler(settings: TrainerConfig, device: str) -> None:
    """Compiles and runs a line for ``device`` if blocks are to be compiled. ConfigError: torch cannot, with its
    reason."""
    if not settings.compile:
        return
    try:
        torch.compile(_line)(torch.zeros(2, device=device))
    except Exception as error:  # compilers that are missing, old or broken raise all kinds
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:160]
        needs = "a C++ compiler (g++ or the one that CXX names)" if device == CPU else "triton and a C compiler"
        raise ConfigError(
            f"trainer.compile = true: torch cannot compile here ({reason}); install {needs}, or take false"
        ) from None


def _line(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + 1


def compile_blocks(model: HybridLM) -> None:
    """From here on each block of ``model`` compiles itself when it is first called, and again for what that does not
    fit."""
    warnings.filterwarnings(
        "ignore", message="Dynamo detected a call to a `functools.lru_cache`"
    )  # ours depend on their arguments alone
    torch._dynamo.config.recompile_limit = max(_VERSIONS, torch._dynamo.config.recompile_limit)
    for block in model.blocks:
        block.compile()


def eager(model: HybridLM) -> AbstractContextManager[object]:
    """Within it compiled blocks run as they are written: for work whose shapes change with each call."""
    compiled = any(block._compiled_call_impl is not None for block in model.blocks)
    return (
        torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    )  # the first imports the compiler, which takes seconds
