"""A file that one process holds for as long as it lives. Needs no torch."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


class Held(Exception):
    """Another process has the file. ``who`` says which, in words."""

    def __init__(self, who: str) -> None:
        super().__init__(who)
        self.who = who


class Holding:
    """The file while this process has it."""

    def __init__(self, path: Path, made: bool) -> None:
        self._path, self._made, self._signed = path, made, False

    def sign(self) -> None:
        """Says in the file who holds it; from then on it stays, empty once it is let go."""
        self._signed = True
        self._path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")

    def let_go(self) -> None:
        with suppress(OSError):
            if self._signed:
                self._path.write_bytes(b"")
            elif self._made:
                self._path.unlink()


@contextmanager
def holding(path: Path) -> Iterator[Holding]:
    """While the block runs no other process holds ``path``, which is made where it is missing.

    The lock is the system's: it ends with the process, however that ends, and what a dead one wrote into the file holds
    nobody up.

    Raises:
        Held: another process has it.
        OSError: the file cannot be made, or the file system knows no locks.
    """
    made = not path.exists()
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise Held(_who(path)) from None
    except NotImplementedError as error:
        raise OSError(str(error)) from None
    holding = Holding(path, made)
    try:
        yield holding
    finally:
        holding.let_go()
        lock.release()


def _who(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")[:200].strip() or "another process"
    except OSError:  # Windows lets nobody read a file that is locked
        return "another process"
