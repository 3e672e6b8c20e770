"""Ending a run before its last step: a signal or the time limit asks, the next optimizer step answers, on every rank alike.

A handler only takes a note: between two micro-batches of a step there is nothing that could be saved exactly. At the end of each optimizer
step the ranks agree (a signal may have reached one of them), ``Checkpoints`` saves, and ``Stopped`` ends the loop. An exception does so
because Lightning's own flag, ``should_stop``, would validate once more first.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import lightning
import torch
from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment, SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException

from hybridlm.config.duration import seconds_of
from hybridlm.launcher import launch

if TYPE_CHECKING:
    from hybridlm.config.train import TrainerConfig

SIGNALLED = 143  # exit code: what a shell shows for a process that SIGTERM ended
TIME_LIMIT = "trainer.time_limit"
_NONE, _TIME, _SIGNAL = range(3)  # the larger wins where ranks differ


class Stopped(SystemExit):
    """The run has saved a checkpoint and ends; it can go on later. ``code`` is the exit code: 0 for the time limit."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code)
        self.reason = reason

    def result(self) -> dict[str, Any]:
        """Of the run: nothing. Raises itself where the process is to end with its code, and with it a sweep."""
        if self.code:
            raise self
        return {}


class Stopping(lightning.Callback):
    """Hears of signals and of the time limit. ``Checkpoints`` asks it what to do."""

    def __init__(self, settings: TrainerConfig, began: float, say: Callable[[str], None]) -> None:
        """``began``: ``time.perf_counter()`` when the run did. ``say`` prints a line on the first rank."""
        self._limit = None if settings.time_limit is None else seconds_of(str(settings.time_limit))
        self._requeue, self._began, self._say = settings.requeue, began, say
        self._trainer: lightning.Trainer | None = None
        self._signal: signal.Signals | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Takes the signals over from Lightning, which gives back the original handlers when the run ends."""
        self._trainer = trainer
        if trainer.received_sigterm:  # in the moment that Lightning had the handler
            self._signal = signal.SIGTERM
        self._listen(self._note)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """The last validation, after training: everything is saved, and a resumed run does it again."""
        if trainer.state.fn == "validate":
            self._trainer = trainer
            self._listen(self._end_now)

    def reason(self, trainer: lightning.Trainer) -> str | None:
        """Why the run is to end at this step, the same on every rank; None: it goes on. Every rank has to ask, once a step."""
        over = self._limit is not None and time.perf_counter() - self._began >= self._limit
        mine = _SIGNAL if self._signal is not None else _TIME if over else _NONE
        agreed = mine
        if trainer.world_size > 1:
            agreed = int(trainer.strategy.reduce(torch.tensor(mine, device=trainer.strategy.root_device), reduce_op="max"))
        if agreed == _SIGNAL:
            return "a signal" if self._signal is None else self._signal.name
        last = trainer.global_step >= trainer.max_steps
        return TIME_LIMIT if agreed == _TIME and not last else None

    def stop(self, trainer: lightning.Trainer, reason: str) -> None:
        """Ends the run, whose state is saved. Raises Stopped."""
        if reason == TIME_LIMIT:
            raise Stopped(0, reason)
        if self._requeue and trainer.is_global_zero:
            requeue(self._say)
        # A child that Lightning started itself must not fail: the parent would be killed for it, in the midst of its own ending.
        child = trainer.local_rank > 0 and isinstance(trainer.strategy.cluster_environment, LightningEnvironment)  # type: ignore[attr-defined]
        raise Stopped(0 if child else SIGNALLED, reason)

    def _listen(self, handler: Callable[[int, FrameType | None], None]) -> None:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGTERM", "SIGUSR1"):
                if hasattr(signal, name):  # Windows has no SIGUSR1
                    signal.signal(getattr(signal, name), handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGTERM:
            self._end_now(number, frame)
        self._signal = signal.Signals(number)

    def _end_now(self, number: int, frame: FrameType | None) -> None:
        """As if there had been no handler; the processes that Lightning started go first."""
        launcher = self._trainer.strategy.launcher if self._trainer is not None else None
        if launcher is not None:
            launcher.kill(signal.SIGTERM)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def signalled() -> Iterator[None]:
    """Gives Lightning's own ending by SIGTERM, of which its loop may hear before ours, an exit code that says so."""
    try:
        yield
    except SIGTERMException:
        raise SystemExit(SIGNALLED) from None


def slurm_plugins(processes: int) -> list[ClusterEnvironment]:
    """In a job of SLURM: Lightning's view of it without its own handling of signals, which would save at any moment and train on.

    processes: of the run. In a job of one task Lightning starts the others itself, and must not take itself for one of srun's.
    """
    if not SLURMEnvironment.detect():
        return []
    return [LightningEnvironment()] if processes > 1 and launch() is None else [SLURMEnvironment(auto_requeue=False)]


def requeue(say: Callable[[str], None]) -> None:
    """Asks SLURM to start this job again, where it runs in one. What goes wrong is said and ends nothing."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")
    if not re.fullmatch(r"\d+(_\d+)?", job):
        say("warning     trainer.requeue: this is no job of SLURM (SLURM_JOB_ID is not set)")
        return
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        problem = done.stderr.strip() or f"exit code {done.returncode}" if done.returncode else None
    except OSError as error:
        problem = str(error)
    say(f"job {job} is queued again" if problem is None else f"warning     scontrol requeue {job}: {problem}")
