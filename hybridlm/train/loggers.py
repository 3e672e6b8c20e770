"""Where metrics go besides the console: always to the run folder, and to one remote logger, which may fail without
ending the run.

The remote logger is last in the list, so that metrics.jsonl has each row before it does.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from hybridlm.errors import ConfigError
from hybridlm.machine.launcher import is_first_rank
from hybridlm.train.run_files import RowLogger, RunFiles
from hybridlm.train.tensorboard import TensorBoard
from hybridlm.train.wandb import Wandb, refuse_bad_run_id, wandb_arguments

if TYPE_CHECKING:
    from types import TracebackType

    from hybridlm.config.run import RunConfig
    from hybridlm.runs.run_folder import RunFolder
    from hybridlm.train.console import Console
    from hybridlm.train.run_files import Row

Backend = Wandb | TensorBoard

_PACKAGES = {"wandb": "pip install wandb", "tensorboard": "pip install 'hybridlm[tensorboard]'"}


class Remote(RowLogger):
    """A backend as one of Lightning's loggers. What it raises is reported once, and it is not called again."""

    def __init__(self, backend: Backend | None, rows: Sequence[Row], say: Callable[[str], None]) -> None:
        """backend: None does nothing; rows: those of earlier sessions."""
        super().__init__()
        self._backend, self._rows, self._say, self._started = backend, rows, say, False

    def _call(self, action: Callable[[Backend], None]) -> None:
        if self._backend is None:
            return
        try:
            if not self._started:  # with the first row: a run that fails before it leaves nothing behind
                self._started = True
                self._say(f"logger      {self._backend.start(self._rows)}")
            action(self._backend)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0][:160]
            self._say(
                f"warning     the logger {type(self._backend).__name__.lower()} failed and is no longer used, "
                f"metrics.jsonl continues: {type(error).__name__}: {reason}"
            )
            failed, self._backend = self._backend, None
            with suppress(Exception):  # otherwise it would fail again at the end of the process
                failed.close()

    @rank_zero_only
    def log_metrics(self, metrics: Row, step: int | None = None) -> None:
        scalars = {name: value for name, value in metrics.items() if not isinstance(value, list)}
        self._call(lambda backend: backend.log(scalars, step or 0))

    @rank_zero_only
    def samples(self, step: int, prompts: Sequence[str], texts: Sequence[str]) -> None:
        """Text sampled after ``step``."""
        if prompts:
            self._call(lambda backend: backend.samples(step, prompts, texts))

    @rank_zero_only
    def summary(self, summary: Mapping[str, Any]) -> None:
        """What summary.json contains."""
        self._call(lambda backend: backend.summary(summary))

    @rank_zero_only
    def close(self) -> None:
        """Flushes and ends. Lightning's ``finalize`` comes before the last validation, too early for it."""
        if self._started:
            self._call(lambda backend: backend.close())
        self._backend = None


class Loggers:
    """Those of a run on this rank. ``all`` is in the order in which they are called."""

    def __init__(
        self, config: RunConfig, folder: RunFolder, console: Console, *, resumed_at: int | None, sweep: str | None
    ) -> None:
        """sweep: the name of the sweep that the run belongs to."""
        self.all: list[Logger] = [console]
        backend: Backend | None = None
        rows: list[Row] = []
        if is_first_rank():
            files = RunFiles(folder.metrics_jsonl, folder.metrics_csv, resume_step=resumed_at, say=console.say)
            rows, self.all = files.kept, [files, console]
            match config.logger.name:
                case "wandb":
                    backend = Wandb(wandb_arguments(config, folder, sweep), folder, timeout=config.logger.timeout)
                case "tensorboard":
                    backend = TensorBoard(folder.tensorboard)
        self.remote = Remote(backend, rows, console.say)
        self.all.append(self.remote)

    def finish(self, summary: dict[str, Any]) -> None:
        """At the end of a run that was not interrupted."""
        self.remote.summary(summary)
        self.remote.close()

    def __enter__(self) -> Loggers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:  # the run has failed or was stopped
            self.remote.close()


def refuse_logger(config: RunConfig) -> None:
    """UserError: the logger of ``config.logger`` would fail at the first row, as its package or a legal id is
    missing."""
    name = config.logger.name
    if name in _PACKAGES and importlib.util.find_spec(name) is None:
        raise ConfigError(f"logger = {name!r}: the package {name} is not installed; {_PACKAGES[name]}, or logger=files")
    if name == "wandb":
        refuse_bad_run_id()
