"""Files in memory: mapped, read-only, and looked after while training reads them.

A page of a mapped file that is not there any more ends the process by a signal (SIGBUS) instead of an exception. So the
size of a file is asked for again before a window is read from it, which takes less than a microsecond.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np

from hybridlm.errors import RunFailed

_REMEDY = (
    "put it back, or delete its folder if that is one of prepared data, which the next start makes again; "
    "then go on from the last checkpoint (ckpt=auto)"
)


class Mapped:
    """One file. Making it raises RunFailed where it cannot be mapped: it is not there, or empty."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise RunFailed(f"{path}: cannot be read ({error.strerror}); {_REMEDY}") from error
        except ValueError as error:
            raise RunFailed(f"{path}: is empty; {_REMEDY}") from error

    def array(self, dtype: str, offset: int = 0, count: int = -1) -> np.ndarray:
        """``count`` values from byte ``offset`` on, -1: all. RunFailed: there are not so many.

        A plain array: slicing a np.memmap takes several times as long, and making one asks for every folder above the
        file.
        """
        try:
            return np.frombuffer(self._map, dtype, count, offset)
        except ValueError as error:
            raise RunFailed(f"{self.path}: is cut off at {len(self._map):,} bytes; {_REMEDY}") from error

    def refuse_cut(self) -> None:
        """RunFailed: it is shorter than it was, or its file system has lost it. One that was deleted or replaced is
        read as it was."""
        try:
            size = self._map.size()
        except OSError as error:
            raise RunFailed(f"{self.path}: cannot be read any more ({error.strerror}); {_REMEDY}") from error
        if size < len(self._map):
            raise RunFailed(
                f"{self.path}: was cut from {len(self._map):,} to {size:,} bytes while it was read; {_REMEDY}"
            )
