"""The process of a job: started apart from the runner, ended with it, and known to be alive by a lock that it holds.

The lock is on an open file that the job inherits, so that it lasts as long as the job does, whatever becomes of the
runner. On Linux a job is told to stop when its runner dies; elsewhere it goes on, and the next runner waits for it.
Windows has neither.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from hybridlm.config.groups import root
from hybridlm.errors import UserError
from hybridlm.files.folders import refuse_links
from hybridlm.machine.lifetime import dies_with
from hybridlm.sweep.job import LOCK, LOG

_ERROR = re.compile(r"(config )?error: .+|([A-Za-z_]\w*\.)*\w*(Error|Exception|Interrupt|Exit)\b.*")
_PROGRAM = (
    sys.executable,
    "-P",
    "-m",
    "hybridlm",
    "train",
)  # -P: no module is taken from the folder that a sweep names as its own
_TAIL = 16_384  # bytes of a log that are searched for its last error


BUSY = -1


class JobProcess:
    """A running job."""

    def __init__(self, overrides: Sequence[str], folder: Path, environment: Mapping[str, str], cwd: Path) -> None:
        """Starts ``hybridlm train`` with these overrides in ``cwd`` and a session of its own; what it prints goes to
        the folder's job.log.

        ConfigError: another process is at work in the folder.
        """
        folder.mkdir(parents=True, exist_ok=True)
        refuse_links(folder)
        self._log = folder / LOG
        self._offset = self._log.stat().st_size if self._log.exists() else 0
        self._began = time.monotonic()
        lock = hold(folder / LOCK)
        if lock == BUSY:
            raise UserError(f"{folder}: another process is at work here")
        try:
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    [*_PROGRAM, *overrides],
                    cwd=cwd,
                    env={**environment, "PYTHONPATH": _modules(environment)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=() if lock is None else (lock,),
                    preexec_fn=dies_with(os.getpid(), signal.SIGTERM),
                )
        finally:
            if lock is not None:
                os.close(lock)  # the job has it

    def poll(self) -> int | None:
        """The exit code (negative: the signal), or None while it runs."""
        return self._process.poll()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def stop(self) -> None:
        """Asks it to save and end."""
        self._process.terminate()

    def kill(self) -> None:
        """Ends it and what it has started."""
        if os.name == "posix":
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        else:
            self._process.kill()

    def last_error(self) -> str:
        """The last line of its output that looks like an error, else the last line, else nothing."""
        with self._log.open("rb") as log:
            log.seek(max(self._offset, self._log.stat().st_size - _TAIL))
            lines = [line.strip() for line in log.read().decode("utf-8", "replace").splitlines() if line.strip()]
        errors = [line for line in lines if _ERROR.fullmatch(line)]
        return (errors or lines or [""])[-1][:300]


def _modules(environment: Mapping[str, str]) -> str:
    """PYTHONPATH of a job: this very package, where it lies in a checkout that may not be installed."""
    given = environment.get("PYTHONPATH", "")
    return os.pathsep.join(
        part for part in (str(root()) if (root() / "pyproject.toml").is_file() else "", given) if part
    )


def hold(path: Path) -> int | None:
    """An open file with a lock on it, ``BUSY`` where another process has it, None where there are no such locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return BUSY
    return descriptor


def is_held(path: Path) -> bool:
    """Whether some process has the lock."""
    lock = hold(path) if path.exists() else None
    if lock is not None and lock != BUSY:
        os.close(lock)
    return lock == BUSY
