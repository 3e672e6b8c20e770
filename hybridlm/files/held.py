"""A lock file that names its holder. Needs no torch."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


class Held(Exception):
    """Another process has the lock. Its text describes that process."""


class Holding:
    """The lock file while this process holds it."""

    def __init__(self, path: Path) -> None:
        self._path, self._made, self._signed = path, not path.exists(), False

    def sign(self) -> None:
        """Writes into the file who holds it; from then on the file is kept, emptied on release."""
        self._signed = True
        self._path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")

    def release(self) -> None:
        with suppress(OSError):
            if self._signed:
                self._path.write_bytes(b"")
            elif self._made:
                self._path.unlink()


@contextmanager
def holding(path: Path) -> Iterator[Holding]:
    """Holds the lock ``path``, created if missing, while the block runs.

    It is a lock of the operating system: it ends with the process, however that ends, whatever the file contains.

    Raises:
        Held: another process has it.
        OSError: the file cannot be created, or the file system has no locks.
    """
    held, lock = Holding(path), FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = ""
        with suppress(OSError):  # a locked file cannot be read on Windows
            who = path.read_text(encoding="utf-8", errors="replace")[:200].strip()
        raise Held(who or "another process") from None
    except NotImplementedError as error:
        raise OSError(str(error)) from None
    try:
        yield held
    finally:
        held.release()
        lock.release()
