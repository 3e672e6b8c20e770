"""A trained run, ready to generate."""

from __future__ import annotations

from hybridlm.files.plain import Unreadable, read_yaml
from hybridlm.generate.engine import Engine
from hybridlm.machine.device import inference_device
from hybridlm.runs.checkpoint import LoadedRun, load_run
from hybridlm.runs.run_folder import RunFolder


def open_run(name: str, *, ema: bool, context: int | None) -> tuple[LoadedRun, Engine]:
    """name: of a run or a checkpoint, as for ``find_run``; context: the most tokens of a text. UserError: it cannot be
    loaded."""
    run = load_run(name, inference_device(), ema=ema)
    return run, Engine(run.model, run.tokenizer, context=context)


def trained_length(folder: RunFolder) -> int | None:
    """Tokens of a window in training; None if config.yaml does not tell, which does not make the weights useless. Of
    another version of this program it has other fields, so only this one is read."""
    try:
        config = read_yaml(folder.config)
    except Unreadable:
        return None
    data = config.get("data") if isinstance(config, dict) else None
    length = data.get("seq_len") if isinstance(data, dict) else None
    return length if isinstance(length, int) and length > 1 else None
