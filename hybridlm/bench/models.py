"""The models of a benchmark: a trained run, or a configuration with random weights."""

from __future__ import annotations

from pathlib import Path

import torch

from hybridlm.config.run import RunConfig
from hybridlm.errors import UserError
from hybridlm.generate.engine import Engine
from hybridlm.memory.vocabulary import planned_vocabulary
from hybridlm.model.build import fresh_model
from hybridlm.runs.checkpoint import load_run


def trained(checkpoint: Path, device: torch.device, dtype: torch.dtype, *, ema: bool) -> tuple[str, Engine]:
    """A name and the model, with the parameters that may be rounded in ``dtype``. UserError: it cannot be loaded."""
    loaded = load_run(str(checkpoint), device, ema=ema)
    loaded.model.round_parameters(dtype)
    return f"{loaded.folder.path.name}, step {loaded.step}", Engine(loaded.model, loaded.tokenizer)


def untrained(config: RunConfig, device: torch.device, dtype: torch.dtype) -> Engine:
    """The model of ``config``, initialised with its seed. UserError: the vocabulary is smaller than the tokenizer's."""
    try:
        model = fresh_model(config.model, planned_vocabulary(config).ids, seed=config.seed, device=device)
    except ValueError as error:
        raise UserError(str(error)) from None
    model.round_parameters(dtype)
    return Engine(model, None)
