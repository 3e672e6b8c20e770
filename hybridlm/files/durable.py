"""Replacing a file so that a crash at any moment leaves the old one or the new one, complete and on disk. Needs no
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
    """The block writes the file whose path it gets, in the same folder; then it is synced and renamed to ``target``.

    Raises what the block raises, and OSError if the file cannot be written; the partial file is deleted.
    """
    # The name is unique, also on a file system shared between machines; ``remove_partials`` reads the process id.
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.{os.getpid()}.partial")
    try:
        yield partial
        _sync(partial)
        os.replace(partial, target)
        _sync(target.parent)
    except OSError as error:
        if error.filename in (None, str(partial)):  # the user knows the target only
            error.filename, error.filename2 = str(target), None
        raise
    finally:
        partial.unlink(missing_ok=True)


def remove_partials(folder: Path) -> None:
    """Deletes partial files of killed processes in ``folder``."""
    for path in folder.glob(".*.partial"):
        if (match := _PARTIAL.fullmatch(path.name)) and not _runs_elsewhere(int(match[1])):
            with suppress(OSError):
                path.unlink()


def _runs_elsewhere(process: int) -> bool:
    """Whether another process with this id is alive on this machine, as far as is known."""
    if os.name != "posix" or process == os.getpid():  # on Windows kill would end it; open files cannot be deleted there
        return False
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):  # no process has such an id
        return False
    return True


def _sync(path: Path) -> None:
    """Makes the content of a file, or the renames in a folder, durable."""
    if os.name == "posix" or not path.is_dir():  # Windows has no such call for folders
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
