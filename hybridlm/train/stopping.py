"""Ending a run before its last step: a signal or the time limit asks, the next optimizer step answers, on every rank
alike.

A handler only takes a note: between two micro-batches of a step there is nothing that could be saved exactly. At the
end of each optimizer step the ranks agree (a signal may have reached one of them), ``Checkpoints`` saves, and
``Stopped`` ends the loop. An exception does so because Lightning's own flag, ``should_stop``, would validate once more
first.
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
from typing import TYPE_CHECKING, Any

import lightning
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from hybridlm.config.duration import seconds_of
from hybridlm.errors import RunFailed
from hybridlm.machine.launcher import is_child, is_first_rank
from hybridlm.machine.signals import INTERRUPTED, NOTICE, SIGNALLED, requeue

if TYPE_CHECKING:
    from hybridlm.config.train import TrainerConfig

TIME_LIMIT = "trainer.time_limit"
# Where ranks differ the last one wins: a notice also asks for another turn.
_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR2", "SIGUSR1")
_REASONS = (None, TIME_LIMIT, *_SIGNALS)
# seconds in which signals are one: SLURM, torchrun and wrappers of commands send several, and of different kinds
_ONE = 1.0


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
        self._signal: str | None = None
        self._since = 0.0  # time.monotonic() of it
        self._others: dict[int, Callable[[int, FrameType | None], Any]] = {}  # handlers that were there before ours

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Takes the signals over from Lightning, which gives back the original handlers when the run ends."""
        if trainer.received_sigterm:  # in the moment that Lightning had the handler
            self._note(signal.SIGTERM, None)
        self._listen(self._note)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """The last validation, after training: everything is saved, and a resumed run does it again."""
        if trainer.state.fn == "validate":
            self._listen(self._end_now)

    def reason(self, trainer: lightning.Trainer) -> str | None:
        """Why the run is to end at this step, the same on every rank; None: it goes on. Every rank has to ask, once a
        step."""
        over = self._limit is not None and time.perf_counter() - self._began >= self._limit
        mine = _REASONS.index(self._signal or (TIME_LIMIT if over else None))
        agreed = mine
        if trainer.world_size > 1:
            agreed = int(
                trainer.strategy.reduce(torch.tensor(mine, device=trainer.strategy.root_device), reduce_op="max")
            )
        reason = _REASONS[agreed]
        return None if reason == TIME_LIMIT and trainer.global_step >= trainer.max_steps else reason

    def stop(self, trainer: lightning.Trainer, reason: str) -> None:
        """Ends the run, whose state is saved. Raises Stopped, or what another one who waits for this signal raises."""
        if reason == TIME_LIMIT:
            raise Stopped(0, reason)
        number = getattr(signal, reason)
        if self._requeue and number == NOTICE:
            if trainer.is_global_zero:
                requeue(self._say)
            trainer.strategy.barrier()  # srun --kill-on-bad-exit ends all as soon as one has ended
        if number in self._others:
            self._others[number](number, None)
        # A child that the first rank started itself must not fail: that would be the end of the first one in the midst
        # of its own ending.
        raise Stopped(0 if is_child() else INTERRUPTED if number == signal.SIGINT else SIGNALLED, reason)

    def _listen(self, handler: Callable[[int, FrameType | None], None]) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for name in _SIGNALS:
            number = getattr(signal, name, None)  # Windows has not all
            if number is None:
                continue
            before = signal.getsignal(number)
            if (
                name == "SIGUSR2" and before is signal.SIG_DFL and not is_child()
            ):  # means nothing unless someone, as submitit, waits for it
                continue
            if name.startswith("SIGUSR") and callable(before) and not before.__module__.startswith("hybridlm"):
                self._others[number] = before
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signal is None:
            self._signal, self._since = signal.Signals(number).name, now
            if number == signal.SIGINT and is_first_rank():  # past the console, in whose midst the signal may have come
                os.write(2, b"\nCtrl-C: saving at the end of this step; once more ends at once\n")
            return
        # SLURM sends SIGTERM again and again, and SIGKILL follows in any case.
        if now - self._since > _ONE and (
            number == signal.SIGINT or (number == signal.SIGTERM and "SLURM_JOB_ID" not in os.environ)
        ):
            self._end_now(number, frame)

    def _end_now(self, number: int, frame: FrameType | None) -> None:
        """As if there had been no handler."""
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


@contextmanager
def signalled() -> Iterator[None]:
    """Gives two endings of Lightning's own, of which its loop may hear before ours, what says so: SIGTERM its exit
    code, and Ctrl-C, of which Lightning makes an exit code, its exception. A signal that ends the process at once
    (SIGBUS of a token file whose disk has gone) says in which line it came.

    RunFailed: a process of data.workers was ended by another than us, of which torch tells wherever this one is.
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
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):  # torch has no class for it
            raise
        raise RunFailed(
            f"a process of data.workers has ended before its time: {error}; go on from the last checkpoint"
        ) from error
