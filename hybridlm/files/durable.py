"""Replacing a file so that a crash at any moment leaves the old one or the new one, whole and on the disk. Needs no
torch."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PARTIAL = re.compile(r"\..+\.(\d+)\.partial")


@contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """The block makes the file of the name it gets, in the same folder; then it is synced and renamed to ``target``.

    Raises what the block raises, and OSError where the disk does not take the file; the half-written one is gone then.
    """
    # The name is this writer's alone, on a file system shared between machines too; the process stands last, for
    # ``remove_partials``.
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.{os.getpid()}.partial")
    try:
        yield partial
        _sync(partial)
        os.replace(partial, target)
        _sync(target.parent)
    except OSError as error:
        if error.filename in (None, str(partial)):  # what the user knows is the target
            error.filename, error.filename2 = str(target), None
        raise
    finally:
        partial.unlink(missing_ok=True)


def remove_partials(folder: Path) -> None:
    """Deletes what killed processes left half-written in ``folder``."""
    for path in folder.glob(".*.partial"):
        if (match := _PARTIAL.fullmatch(path.name)) and not _runs_elsewhere(int(match[1])):
            with suppress(OSError):
                path.unlink()


def _runs_elsewhere(process: int) -> bool:
    """Whether a process of this number, other than this one, is alive on this machine, as far as one can ask."""
    if (
        os.name != "posix" or process == os.getpid()
    ):  # on Windows asking would end it; there, an open file cannot be deleted anyway
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(path: Path) -> None:
    """Makes a file's content, or the renames in a folder, durable."""
    if os.name == "nt" and path.is_dir():  # Windows has no such call for folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
