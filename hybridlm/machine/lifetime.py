"""The ranks of a run end together: none waits for one that has ended, and none outlives the process that started it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from hybridlm.errors import UserError
from hybridlm.machine.launcher import BY_FIRST_RANK, any_launch, launch
from hybridlm.machine.signals import INTERRUPTED, SIGNALLED

_WATCHED = (BY_FIRST_RANK, "torchrun", "srun")  # launchers that live as long as the processes they start
_LOOK_EVERY, _GRACE, _TO_SAVE = 0.2, 3.0, 30.0  # seconds
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


@contextmanager
def ending_together() -> Iterator[None]:
    """Around a whole command: no rank of a run is left waiting for one that has ended.

    A rank that was started by the first one, torchrun or srun ends when its parent does, for whatever reason. The first
    rank and torchrun watch their children; srun does not, so a failing command ends its step.
    """
    with suppress(UserError):  # raised again when the launch is needed
        _end_with_parent()
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and error.code in (None, 0, SIGNALLED, INTERRUPTED):
            raise
        launched = None
        with suppress(UserError):
            launched = launch()
        if launched is None or launched.name != "srun" or shutil.which("scancel") is None:
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stdout.flush()
        time.sleep(_GRACE)  # most have noticed by then, and end with a line of their own
        subprocess.Popen(["scancel", "--signal=KILL", str(launched.id)])
        os._exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)


def dies_with(parent: int, number: int) -> Callable[[], None] | None:
    """A ``preexec_fn`` with which a child gets signal ``number`` when ``parent`` ends. None: only Linux can do that."""
    if sys.platform != "linux":
        return None
    import ctypes

    prctl = ctypes.CDLL(None).prctl

    def prepare() -> None:
        prctl(_SET_PARENT_DEATH_SIGNAL, number)
        if os.getppid() != parent:  # it died in between
            os._exit(1)

    return prepare


def _end_with_parent() -> None:
    """If the parent is a launcher, which may be killed without notice. Not on Windows, where a process cannot tell."""
    launched, parent = any_launch(), os.getppid()
    if launched is None or launched.name not in _WATCHED or os.name != "posix":
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_EVERY)
        if launched.name != BY_FIRST_RANK:  # the other ranks are still alive: all save together, as after a SIGTERM
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(_TO_SAVE)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
