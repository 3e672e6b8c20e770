"""A trained run, ready to generate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hybridlm.errors import UserError
from hybridlm.runs.resume import recorded
from hybridlm.runs.run_folder import RunFolder

if TYPE_CHECKING:
    from hybridlm.generate.engine import Engine
    from hybridlm.runs.checkpoint import LoadedRun


def open_run(checkpoint: Path, *, ema: bool, context: int | None) -> tuple[LoadedRun, Engine]:
    """checkpoint: one in a run folder (``find_run``); context: the most tokens of a text. UserError: it cannot be
    loaded."""
    from hybridlm.generate.engine import Engine
    from hybridlm.machine.device import inference_device
    from hybridlm.runs.checkpoint import load_run

    run = load_run(str(checkpoint), inference_device(), ema=ema)
    return run, Engine(run.model, run.tokenizer, context=context)


def trained_length(folder: RunFolder) -> int | None:
    """Tokens of a window in training; None if config.yaml is not readable, which does not make the weights useless."""
    try:
        return recorded(folder).data.seq_len
    except UserError:
        return None
