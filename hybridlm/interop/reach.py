"""Where a model can be exported to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from hybridlm.config.mixers import MIXERS
from hybridlm.config.model import ModelConfig
from hybridlm.interop.architecture import Candidate, Need, advice
from hybridlm.interop.architectures import ARCHITECTURES
from hybridlm.interop.gguf.architectures import TARGETS

_Candidate = TypeVar("_Candidate", bound=Candidate)


def nearest(model: ModelConfig, candidates: Sequence[_Candidate]) -> tuple[_Candidate, list[Need]]:
    """The first architecture that represents ``model`` exactly, with nothing it needs; else the one where the fewest
    constraints stand in the way, those that no override lifts counting first."""
    for one in candidates:
        if not any(one.needs(model)):
            return one, []
    found = [(one, advice(one, model)) for one in candidates]
    return min(found, key=lambda one: (sum(not need.overrides for need in one[1]), len(one[1])))


def destinations(model: ModelConfig) -> str:
    """One line: the programs that take the trained model, or why only its own code does."""
    architecture, needs = nearest(model, ARCHITECTURES)
    name = f"transformers {architecture.name.removesuffix('ForCausalLM')}"
    llama_cpp = [] if nearest(model, TARGETS)[1] else ["llama.cpp"]
    if not needs:
        return f"to {', '.join([name, *architecture.readers, *llama_cpp])}"
    code = ", ".join(["as remote code", *(f"to {program}" for program in llama_cpp)])
    if all(need.overrides for need in needs):
        return f"{code}; to {name} with {' '.join(override for need in needs for override in need.overrides)}"
    titles = [mixer.title for kind, mixer in MIXERS.items() if kind in model.mixers]
    only = "" if llama_cpp else " only"
    return f"{code}{only}: no architecture of transformers consists of {' and '.join(titles)}"
