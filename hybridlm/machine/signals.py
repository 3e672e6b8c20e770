"""SIGUSR1, by which a job of SLURM is told that its time is nearly over, from the first moment of the process.

Until training begins there is nothing to save, and the signal would kill: here it ends the run, which asks for another
turn where that is wanted (``trainer.requeue``). From then on train/stopping.py listens.
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

SIGNALLED = 143  # exit code: what a shell shows for a process that SIGTERM ended
INTERRUPTED = 130  # one that Ctrl-C ended
NOTICE: signal.Signals | None = getattr(signal, "SIGUSR1", None)  # Windows has none
_FIRST = 5.0  # seconds for the first process to ask for another turn
_early: list[int] = []  # what came before it was known whether the job is to have another turn


@contextmanager
def listening() -> Iterator[None]:
    """Around a command that trains: a notice is kept for ``heeded``."""
    with _handled(_keep):
        yield


@contextmanager
def heeded(again: bool, first: bool) -> Iterator[None]:
    """Within it a notice ends the run with code 143, one that has come already at once. again: the job is to be queued
    again, which the first of its processes asks for."""

    def end(number: int, frame: FrameType | None) -> None:
        print(f"stopped by {signal.Signals(number).name}, with nothing to save", file=sys.stderr, flush=True)
        if not first:
            time.sleep(_FIRST)  # srun --kill-on-bad-exit ends all as soon as one has ended
        elif again:
            requeue(lambda line: print(line, file=sys.stderr, flush=True))
        raise SystemExit(SIGNALLED)

    with _handled(end):
        if _early:
            end(_early.pop(), None)
        yield


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Where a handler can be set from here, and nobody but this module has one: a launcher such as submitit may."""
    here = threading.current_thread() is threading.main_thread()
    if NOTICE is None or not here or signal.getsignal(NOTICE) not in (signal.SIG_DFL, _keep):
        yield
        return
    before = signal.signal(NOTICE, handler)
    try:
        yield
    finally:
        signal.signal(NOTICE, before)


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


def _keep(number: int, frame: FrameType | None) -> None:
    _early.append(number)
