"""Where a model can be exported to."""

from __future__ import annotations

from collections.abc import Sequence

from hybridlm.config.mixers import MIXERS
from hybridlm.config.model import ModelConfig
from hybridlm.interop.architecture import Architecture, Need, advice
from hybridlm.interop.architectures import ARCHITECTURES


def nearest(model: ModelConfig, candidates: Sequence[Architecture] = ARCHITECTURES) -> tuple[Architecture, list[Need]]:
    """The first architecture that represents ``model`` exactly, with nothing it needs; else the one where the fewest
    constraints stand in the way, those that no override lifts counting first."""
    for architecture in candidates:
        if not any(architecture.needs(model)):
            return architecture, []
    found = [(architecture, advice(architecture, model)) for architecture in candidates]
    return min(found, key=lambda one: (sum(not need.overrides for need in one[1]), len(one[1])))


def destinations(model: ModelConfig) -> str:
    """One line: the programs that take the trained model, or why only its own code does."""
    architecture, needs = nearest(model)
    name = f"transformers {architecture.name.removesuffix('ForCausalLM')}"
    if not needs:
        return f"to {', '.join([name, *architecture.readers])}"
    if not all(need.overrides for need in needs):
        titles = [mixer.title for kind, mixer in MIXERS.items() if kind in model.mixers]
        return f"as remote code only: no architecture of transformers consists of {' and '.join(titles)}"
    return f"as remote code; to {name} with {' '.join(override for need in needs for override in need.overrides)}"
