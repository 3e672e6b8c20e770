"""The models of a benchmark: a trained run, or configurations whose weights are drawn from the seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hybridlm.config.run import RunConfig
from hybridlm.config.section import ConfigError
from hybridlm.generate.engine import Engine
from hybridlm.memory.vocabulary import planned_vocabulary
from hybridlm.model.build import fresh_model
from hybridlm.model.count import parameters


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


def untrained(name: str, config: RunConfig, device: torch.device) -> Contender:
    """Of ``config``, with weights from its seed. ConfigError: the vocabulary is smaller than the tokenizer's."""
    try:
        model = fresh_model(config.model, planned_vocabulary(config).ids, seed=config.seed, device=device)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return Contender(name, Engine(model, None))
