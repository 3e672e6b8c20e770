"""Where a model can be exported to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from hybridlm.config.mixers import MIXERS
from hybridlm.config.model import ModelConfig
from hybridlm.interop.architecture import Architecture, Candidate, Need, advice
from hybridlm.interop.architectures import ARCHITECTURES
from hybridlm.interop.gguf.architectures import TARGETS

_Candidate = TypeVar("_Candidate", bound=Candidate)


def nearest(model: ModelConfig, candidates: Sequence[_Candidate]) -> tuple[_Candidate, list[Need]]:
    """The first architecture that represents ``model`` exactly, with nothing it needs; else the one where the fewest
    constraints stand in the way, those that no override lifts counting first."""
    found = fitting(model, candidates)
    if found is not None:
        return found, []
    advised = [(one, advice(one, model)) for one in candidates]
    return min(advised, key=lambda one: (sum(not need.overrides for need in one[1]), len(one[1])))


def fitting(model: ModelConfig, candidates: Sequence[_Candidate]) -> _Candidate | None:
    """The first architecture that represents ``model`` exactly, or None."""
    return next((one for one in candidates if not any(one.needs(model))), None)


def destinations(model: ModelConfig, *, advised: bool = False) -> str:
    """One line: the programs that take the trained model, or that only its own code does. advised: then also why, or
    what would change that, for which other models are tried."""
    architecture = fitting(model, ARCHITECTURES)
    llama_cpp = ["llama.cpp"] if fitting(model, TARGETS) else []
    if architecture is not None:
        return f"to {', '.join([_name(architecture), *architecture.readers, *llama_cpp])}"
    code = ", ".join(["as remote code", *(f"to {program}" for program in llama_cpp)])
    held = [{need.value for need in one.needs(model) if not need.overrides} for one in ARCHITECTURES]
    if all(held):
        titles = " and ".join(mixer.title for mixer in MIXERS.values() if mixer in model.mixers)
        return f"{code}{'' if llama_cpp else ' only'}: no architecture of transformers consists of {titles}"
    if not advised:
        return f"{code}; `hybridlm plan` names what keeps it from other programs"
    closest, needs = nearest(model, ARCHITECTURES)
    return f"{code}; to {_name(closest)} with {' '.join(override for need in needs for override in need.overrides)}"


def _name(architecture: Architecture) -> str:
    return f"transformers {architecture.name.removesuffix('ForCausalLM')}"
