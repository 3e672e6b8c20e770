"""Training from Python (``hybridlm.train``): in this process, without a command line, leaving the process as it was."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from hybridlm.config.run import RunConfig
from hybridlm.errors import ConfigError, RunFailed
from hybridlm.runs.resume import Call
from hybridlm.runs.run_folder import RunFolder

_LOGGERS = ("lightning", "lightning.pytorch", "lightning.fabric")


class TrainedRun(NamedTuple):
    """What ``train`` returns. folder: the run folder, which ``hybridlm.load`` takes; summary: the content of its
    summary.json, empty if trainer.time_limit ended the run."""

    folder: Path
    summary: dict[str, Any]


def train(config: RunConfig, folder: str | Path | None = None, *, resume: bool = False) -> TrainedRun:
    """Trains a model in this process, on one device, and returns its run folder and summary.

    Works in a notebook and in any thread. Signal handlers, log levels, warnings, the random state and the number of
    threads are restored afterwards. Interrupting it (Ctrl-C in the main thread) saves a checkpoint first.

    Args:
        config: of ``hybridlm.compose``.
        folder: the run folder; default: outputs/DATE/TIME in the working directory.
        resume: continue the run in ``folder`` from its newest checkpoint, as with ckpt=last.

    Raises:
        UserError: the configuration, the data or the folder cannot be used (``ConfigError``: a field), before anything
            in ``folder`` is written.
        RunFailed: training ended early: a loss that is not finite, a full disk, SIGTERM.

    Example:
        >>> config = hybridlm.compose(["size=tiny", "trainer.max_steps=20"])
        >>> run = hybridlm.train(config, "outputs/first")
        >>> run.summary["val/bpb"]
    """
    if config.ckpt is not None:
        raise ConfigError(f"ckpt = {config.ckpt!r}: use train(config, folder, resume=True) to resume")
    if config.trainer.devices not in ("auto", 1):
        raise ConfigError("trainer.devices: the Python API trains on one device; use `hybridlm train` for several")
    config = config.model_copy(update={"trainer": config.trainer.model_copy(update={"devices": 1})})
    place = RunFolder(Path(folder or datetime.now().strftime("outputs/%Y-%m-%d/%H-%M-%S-%f")).absolute())
    with place.training() as holding, _restored():
        from hybridlm.train.run import run

        checkpoint = place.newest_checkpoint() if resume else None
        try:
            summary = run(config, place, checkpoint, Call(("train",), meet=holding.sign))
        except SystemExit as end:
            raise RunFailed(f"training was stopped (exit code {end.code}); resume it with resume=True") from None
    return TrainedRun(place.path, summary)


@contextmanager
def _restored() -> Iterator[None]:
    """Gives back what a run changes in the whole process. (Lightning restores the handlers of signals.)"""
    import torch
    from lightning.pytorch.utilities.seed import isolate_rng

    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    threads = torch.get_num_threads()
    with warnings.catch_warnings(), isolate_rng():
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            torch.set_num_threads(threads)
