"""Where metrics go besides the screen: the run folder always, and one remote logger, which can fail without the run.

A remote logger comes last in the list of loggers, so that each row is in metrics.jsonl before it sees it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from hybridlm.errors import ConfigError
from hybridlm.train.run_files import RunFiles
from hybridlm.train.tensorboard import TensorBoard
from hybridlm.train.wandb import Wandb, refuse_bad_run_id, wandb_arguments

if TYPE_CHECKING:
    from types import TracebackType

    from hybridlm.config.run import RunConfig
    from hybridlm.runs.run_folder import RunFolder
    from hybridlm.train.console import Console
    from hybridlm.train.metrics import Metrics

_PACKAGES = {"wandb": "pip install wandb", "tensorboard": "pip install 'hybridlm[tensorboard]'"}


class Backend(Protocol):
    """What a remote logger has to do. Any exception drops it."""

    def start(self, rows: Sequence[Metrics]) -> str:
        """Begins; ``rows`` are those of the run so far. Returns a line for the user, or nothing."""

    def log(self, row: dict[str, float], step: int) -> None: ...

    def histogram(self, name: str, counts: Sequence[float], edges: Sequence[float], step: int) -> None:
        """len(counts) + 1 edges."""

    def samples(self, step: int, prompts: Sequence[str], texts: Sequence[str]) -> None: ...

    def summary(self, facts: dict[str, Any]) -> None: ...

    def close(self) -> str:
        """Ends. Returns a line for the user, or nothing."""


class Remote(Logger):
    """A backend as one of Lightning's loggers. What it raises is said once, and from then on it is left alone."""

    def __init__(
        self, backend: Backend, rows: Sequence[Metrics], *, expert_load: bool, say: Callable[[str], None]
    ) -> None:
        super().__init__()
        self._backend: Backend | None = backend
        self._rows, self._expert_load, self._say = list(rows), expert_load, say
        self._started = False

    def _call(self, action: Callable[[Backend], None]) -> None:
        if self._backend is None:
            return
        try:
            if not self._started:  # with the first row: a run that fails before it leaves nothing behind
                self._started = True
                if line := self._backend.start(self._rows):
                    self._say(f"logger      {line}")
            action(self._backend)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0][:160]
            self._say(
                f"warning     the logger {type(self._backend).__name__.lower()} failed and is left out from here on, "
                f"metrics.jsonl goes on: {type(error).__name__}: {reason}"
            )
            failed, self._backend = self._backend, None
            with suppress(Exception):  # what it holds on to would fail once more, at the end of the process
                failed.close()

    @rank_zero_only
    def log_metrics(self, metrics: Metrics, step: int | None = None) -> None:  # type: ignore[override]
        lists = {name: value for name, value in metrics.items() if isinstance(value, list)}
        scalars = {name: value for name, value in metrics.items() if not isinstance(value, list)}
        self._call(lambda backend: backend.log(scalars, step or 0))
        for name, counts in lists.items() if self._expert_load else ():
            self.histogram(name, counts, [float(edge) for edge in range(len(counts) + 1)], step or 0)

    @rank_zero_only
    def histogram(self, name: str, counts: Sequence[float], edges: Sequence[float], step: int) -> None:
        self._call(lambda backend: backend.histogram(name, counts, edges, step))

    @rank_zero_only
    def samples(self, step: int, prompts: Sequence[str], texts: Sequence[str]) -> None:
        """Text sampled after ``step``."""
        if prompts:
            self._call(lambda backend: backend.samples(step, prompts, texts))

    @rank_zero_only
    def summary(self, facts: dict[str, Any]) -> None:
        """What summary.json holds."""
        self._call(lambda backend: backend.summary(facts))

    @rank_zero_only
    def close(self) -> None:
        """Hands over what is left, within bounds. Lightning's ``finalize`` comes before the last validation, too early
        for it."""
        if self._started:
            self._call(self._end)
        self._backend = None

    def _end(self, backend: Backend) -> None:
        if line := backend.close():
            self._say(f"warning     {line}")

    def log_hyperparams(self, params: Any = None) -> None:
        """The backend was given the configuration."""

    @property
    def name(self) -> str:
        return "remote"

    @property
    def version(self) -> str:
        return ""


class Loggers:
    """All of a run, on this rank. ``all`` is in the order in which they are to be asked."""

    def __init__(
        self, config: RunConfig, folder: RunFolder, console: Console, *, resumed_at: int | None, sweep: str | None
    ) -> None:
        """sweep: the name of the sweep that the run belongs to."""
        self.remote: Remote | None = None
        self.all: list[Logger] = [console]
        if rank_zero_only.rank != 0:
            return
        files = RunFiles(folder.metrics_jsonl, folder.metrics_csv, resume_step=resumed_at, say=console.say)
        self.all = [files, console]
        backend: Backend | None = None
        match config.logger.name:
            case "wandb":
                backend = Wandb(wandb_arguments(config, folder, sweep), folder, timeout=config.logger.timeout)
            case "tensorboard":
                backend = TensorBoard(folder.tensorboard)
        if backend is not None:
            self.remote = Remote(backend, files.kept, expert_load=config.logger.expert_load, say=console.say)
            self.all.append(self.remote)

    def finish(self, summary: dict[str, Any]) -> None:
        """The end of a run that came to its end."""
        if self.remote is not None:
            self.remote.summary(summary)
            self.close()

    def close(self) -> None:
        """Ends the remote logger. A run that fails or is stopped inside ``with`` ends it, too."""
        if self.remote is not None:
            self.remote.close()

    def __enter__(self) -> Loggers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.close()


def refuse_logger(config: RunConfig) -> None:
    """Raise UserError where the logger of ``config.logger`` would fail at the first row: its package or a legal id is
    missing."""
    name = config.logger.name
    if name in _PACKAGES and importlib.util.find_spec(name) is None:
        raise ConfigError(f"logger = {name!r}: the package {name} is not installed; {_PACKAGES[name]}, or logger=files")
    if name == "wandb":
        refuse_bad_run_id()
