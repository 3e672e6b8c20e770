"""A trained run, ready to write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybridlm.config.load import from_yaml
from hybridlm.errors import UserError
from hybridlm.files.plain import Unreadable, read_text
from hybridlm.runs.run_folder import RunFolder, find_run

if TYPE_CHECKING:
    from hybridlm.generate.engine import Engine
    from hybridlm.runs.checkpoint import LoadedRun


@dataclass(frozen=True)
class Writer:
    """trained_length: tokens that the model saw at a time in training; None: the run does not say."""

    engine: Engine
    run: LoadedRun
    trained_length: int | None


def open_run(name: str, *, ema: bool, context: int | None) -> Writer:
    """``name``: `last`, a run folder, or a checkpoint; context: the most tokens a text may hold. ConfigError: it cannot
    be loaded."""
    if context is not None and context < 2:
        raise UserError(f"--context {context}: legal is 2 or more")
    folder, _ = find_run(name)  # what is not there is said before torch is imported, which takes seconds

    from hybridlm.generate.engine import Engine
    from hybridlm.machine.device import inference_device
    from hybridlm.runs.checkpoint import load_run

    run = load_run(name, inference_device(), ema=ema)
    return Writer(Engine(run.model, run.tokenizer, context=context), run, _trained_length(folder))


def _trained_length(folder: RunFolder) -> int | None:
    """A config.yaml of another version does not keep weights from being used."""
    try:
        return from_yaml(read_text(folder.config)).data.seq_len
    except (UserError, Unreadable):
        return None
