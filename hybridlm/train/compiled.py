"""torch.compile of each block, in place: parameters keep their names, and checkpoints their content."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext

import torch

from hybridlm.config.train import TrainerConfig
from hybridlm.errors import ConfigError
from hybridlm.machine.device import CPU
from hybridlm.model.lm import HybridLM

# Compiled versions of a block's code: per kind of layer, with and without gradients, for fixed and dynamic lengths.
_VERSIONS = 64  # torch's default is 8


def refuse_missing_compiler(settings: TrainerConfig, device: str) -> None:
    """Compiles and runs one line for ``device`` if blocks are to be compiled. ConfigError: torch cannot, and why."""
    if not settings.compile:
        return
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.zeros(2, device=device))
    except Exception as error:  # missing, old and broken compilers raise all kinds
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:160]
        needs = "a C++ compiler (g++ or the one that CXX names)" if device == CPU else "triton and a C compiler"
        raise ConfigError(
            f"trainer.compile = true: torch cannot compile here ({reason}); install {needs}, or set it to false"
        ) from None


def compile_blocks(model: HybridLM) -> None:
    """From here on, each block of ``model`` is compiled when it is first called, and again where a guard fails."""
    # The cached functions depend only on their arguments.
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    torch._dynamo.config.recompile_limit = max(_VERSIONS, torch._dynamo.config.recompile_limit)
    for block in model.blocks:
        block.compile()


def eager(model: HybridLM) -> AbstractContextManager[object]:
    """Within it compiled blocks run eagerly: for work whose shapes change with every call."""
    compiled = any(block._compiled_call_impl is not None for block in model.blocks)
    # set_stance imports the compiler, which takes seconds.
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
