"""SIGUSR1, with which SLURM warns a job that its time limit is near, handled from the start of the process.

Until training begins there is nothing to save, and the signal's default would kill the process: here it ends the run
and, if ``trainer.requeue`` is set, requeues the job. From then on train/stopping.py handles it.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from hybridlm.machine.launcher import SIGNALLED

NOTICE: signal.Signals | None = getattr(signal, "SIGUSR1", None)  # Windows has none
_FIRST = 5.0  # seconds that the first rank has to requeue the job
_early: list[int] = []  # signals that came before the configuration said whether to requeue


@contextmanager
def listening() -> Iterator[None]:
    """Around a command that trains: keeps a signal for ``heeded``."""
    with _handled(_keep):
        yield


@contextmanager
def heeded(again: bool, first: bool) -> Iterator[None]:
    """Inside it the signal ends the run with code 143, at once if it has come already. again: requeue the job, which
    its first rank does."""

    def end(number: int, frame: FrameType | None) -> None:
        _print(f"stopped by {signal.Signals(number).name}, with nothing to save")
        if not first:
            time.sleep(_FIRST)  # srun --kill-on-bad-exit kills all ranks as soon as one has ended
        elif again:
            requeue(_print)
        raise SystemExit(SIGNALLED)

    with _handled(end):
        if _early:
            end(_early.pop(), None)
        yield


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Sets the handler where this thread can and no other code has set one: a launcher such as submitit may have."""
    here = threading.current_thread() is threading.main_thread()
    if NOTICE is None or not here or signal.getsignal(NOTICE) not in (signal.SIG_DFL, _keep):
        yield
        return
    before = signal.signal(NOTICE, handler)
    try:
        yield
    finally:
        signal.signal(NOTICE, before)


def _keep(number: int, frame: FrameType | None) -> None:
    _early.append(number)


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def requeue(say: Callable[[str], None]) -> None:
    """Asks SLURM to requeue this job, if it is one. Failures are reported and otherwise ignored."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")
    if not re.fullmatch(r"\d+(_\d+)?", job):
        say("warning     trainer.requeue: not a SLURM job (SLURM_JOB_ID is not set)")
        return
    try:
        subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=True)
        say(f"job {job} is requeued")
    except (OSError, subprocess.CalledProcessError) as error:
        say(f"warning     scontrol requeue {job}: {getattr(error, 'stderr', '').strip() or error}")
