"""Stopping a run before its last step, on a signal or at the time limit: at the end of the current optimizer step, on
every rank.

A signal handler only records the signal: between two micro-batches of a step there is no state that could be resumed
exactly. At the end of each optimizer step the ranks agree (a signal may have reached only one), ``Checkpoints`` saves,
and ``Stopped`` ends the loop. It is an exception because Lightning's own flag, ``should_stop``, would validate once
more first.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from hybridlm.config.duration import seconds_of
from hybridlm.config.train import TrainerConfig
from hybridlm.machine.launcher import INTERRUPTED, SIGNALLED, is_child, is_first_rank
from hybridlm.machine.signals import requeue

TIME_LIMIT = "trainer.time_limit"
# If ranks differ, the last one wins: SIGUSR1 may also ask to be requeued.
_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR2", "SIGUSR1")
_REASONS = (None, TIME_LIMIT, *_SIGNALS)
# Signals within so many seconds count as one: SLURM, torchrun and wrapper scripts send several, of different kinds.
_ONE = 1.0


class Stopped(SystemExit):
    """The run has saved a checkpoint and stops; it can be resumed. ``code`` is the exit code of the process, and of a
    sweep: 0 for the time limit."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code)
        self.reason = reason


class Stopping(lightning.Callback):
    """Watches for signals and the time limit. ``Checkpoints`` asks it whether to stop."""

    def __init__(self, settings: TrainerConfig, began: float, say: Callable[[str], None]) -> None:
        """``began``: ``time.perf_counter()`` when the run did. ``say`` prints a line on the first rank."""
        self._limit = None if settings.time_limit is None else seconds_of(str(settings.time_limit))
        self._requeue, self._began, self._say = settings.requeue, began, say
        self._signal: str | None = None
        self._since = 0.0  # time.monotonic() of it
        self._others: dict[int, Callable[[int, FrameType | None], Any]] = {}  # handlers installed before ours

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Replaces Lightning's handlers; Lightning restores the original ones at the end of the run."""
        if trainer.received_sigterm:  # while Lightning's handler was installed
            self._note(signal.SIGTERM, None)
        self._listen(self._note)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Before the last validation, after training: everything is saved, and a resumed run repeats it."""
        if trainer.state.fn == "validate":
            self._listen(self._end_now)

    def reason(self, trainer: lightning.Trainer) -> str | None:
        """Why the run must stop at this step, the same on every rank; None: it continues. Every rank must call this
        once per step."""
        over = self._limit is not None and time.perf_counter() - self._began >= self._limit
        mine = torch.tensor(_REASONS.index(self._signal or (TIME_LIMIT if over else None)))
        agreed = trainer.strategy.reduce(mine.to(trainer.strategy.root_device), reduce_op="max")
        reason = _REASONS[int(agreed)]
        return None if reason == TIME_LIMIT and trainer.global_step >= trainer.max_steps else reason

    def stop(self, trainer: lightning.Trainer, reason: str) -> None:
        """Stops the run, whose state is saved. Raises Stopped, or what another handler of this signal raises."""
        if reason == TIME_LIMIT:
            raise Stopped(0, reason)
        number = getattr(signal, reason)
        if self._requeue and reason == "SIGUSR1":
            if trainer.is_global_zero:
                requeue(self._say)
            trainer.strategy.barrier()  # srun --kill-on-bad-exit kills all once one has exited
        if number in self._others:
            self._others[number](number, None)
        # A child that the first rank started must not exit with an error: the first rank would be ended while it is
        # shutting down.
        raise Stopped(0 if is_child() else INTERRUPTED if number == signal.SIGINT else SIGNALLED, reason)

    def _listen(self, handler: Callable[[int, FrameType | None], None]) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for name in _SIGNALS:
            number = getattr(signal, name, None)  # Windows lacks some
            before = None if number is None else signal.getsignal(number)
            unused = before is signal.SIG_DFL and name == "SIGUSR2" and not is_child()  # ours if, say, submitit uses it
            if number is None or unused:
                continue
            if name.startswith("SIGUSR") and callable(before) and not before.__module__.startswith("hybridlm"):
                self._others[number] = before
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now, again = time.monotonic(), {signal.SIGINT, signal.SIGTERM}
        if self._signal is None:
            self._signal, self._since = signal.Signals(number).name, now
            if number == signal.SIGINT and is_first_rank():  # not by the console, which the signal may have interrupted
                os.write(2, b"\nCtrl-C: saving at the end of this step; press again to quit now\n")
            return
        if "SLURM_JOB_ID" in os.environ:  # it sends SIGTERM repeatedly, and SIGKILL follows in any case
            again = {signal.SIGINT}
        if now - self._since > _ONE and number in again:
            self._end_now(number, frame)

    def _end_now(self, number: int, frame: FrameType | None) -> None:
        """As if there were no handler."""
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


@contextmanager
def signalled() -> Iterator[None]:
    """Corrects how Lightning reports signals that its loop sees before ours: SIGTERM gets its exit code, and Ctrl-C,
    which Lightning turns into an exit code, its exception. A signal that kills the process (SIGBUS of a token file
    whose disk is gone) prints a traceback.
    """
    if sys.__stderr__ is not None and not faulthandler.is_enabled():
        faulthandler.enable(sys.__stderr__)
    try:
        yield
    except SIGTERMException:
        raise SystemExit(SIGNALLED) from None
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
