"""The models of a benchmark: a trained run, or configurations whose weights are drawn from the seed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from hybridlm.config.run import RunConfig
from hybridlm.config.section import ConfigError
from hybridlm.config.synthetic import words
from hybridlm.data.tokenizer import load_tokenizer
from hybridlm.generate.engine import Engine
from hybridlm.model.build import fresh_model
from hybridlm.model.count import parameters

_BYTE_IDS = 257  # of data.tokenizer.kind=bytes, special tokens aside


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
        model = fresh_model(config.model, _ids(config), seed=config.seed, device=device)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return Contender(name, Engine(model, None))


def _ids(config: RunConfig) -> int:
    """Ids of the tokenizer that a run of this configuration would have; of a BPE as many as are asked for."""
    if config.data.source == "synthetic":
        return len(words(config.data.synthetic))
    settings = config.data.tokenizer
    if settings.path is not None:
        return load_tokenizer(Path(settings.path).expanduser(), settings.special_tokens).vocab_size
    return _BYTE_IDS + len(settings.special_tokens) if settings.kind == "bytes" else settings.vocab_size
