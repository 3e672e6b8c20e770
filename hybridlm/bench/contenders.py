"""The models of a benchmark: a trained run, or configurations whose weights are drawn from the seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hybridlm.config.run import RunConfig
from hybridlm.generate.engine import Engine
from hybridlm.memory.vocabulary import planned_vocabulary
from hybridlm.model.build import fresh_model
from hybridlm.model.count import parameters
from hybridlm.runs.checkpoint import load_run


@dataclass(frozen=True)
class Contender:
    """A model under the name it has in the table."""

    name: str
    engine: Engine

    @property
    def parameters(self) -> int:
        return parameters(self.engine.model)

    @property
    def weight_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.engine.model.parameters())


def trained(run: str, device: torch.device, dtype: torch.dtype, *, ema: bool) -> Contender:
    """A run, rounded to ``dtype`` where its weights may be. ConfigError: it cannot be loaded."""
    loaded = load_run(run, device, ema=ema)
    loaded.model.round_parameters(dtype)  # before there is an engine, which prepares the weights
    return Contender(f"{loaded.folder.path.name}, step {loaded.step}", Engine(loaded.model, loaded.tokenizer))


def untrained(name: str, config: RunConfig, device: torch.device, dtype: torch.dtype) -> Contender:
    """Of ``config``, with weights from its seed. ConfigError: the vocabulary is smaller than the tokenizer's."""
    model = fresh_model(config.model, planned_vocabulary(config).ids, seed=config.seed, device=device)
    model.round_parameters(dtype)
    return Contender(name, Engine(model, None))
