"""Token files in memory: mapped, read-only, and checked while training reads them.

Touching a page of a mapped file that no longer exists kills the process by a signal (SIGBUS) instead of raising an
exception. So the size of a file is checked before a window is read from it, which takes less than a microsecond.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hybridlm.errors import RunFailed

_REMEDY = (
    "restore it, or delete its folder if it is prepared data, which the next start rebuilds; then resume from the last"
    " checkpoint (ckpt=auto)"
)


class Mapped:
    """One mapped file. RunFailed: it cannot be mapped, because it is missing or empty."""

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
        """``count`` values from byte ``offset``, -1: all. RunFailed: there are fewer.

        A plain array: slicing a np.memmap takes several times as long, and making one stats every parent folder.
        """
        try:
            return np.frombuffer(self._map, dtype, count, offset)
        except ValueError as error:
            raise RunFailed(f"{self.path}: is truncated at {len(self._map):,} bytes; {_REMEDY}") from error

    def refuse_cut(self) -> None:
        """RunFailed: the file has become shorter, or its file system has lost it. A file that was deleted or replaced
        is read as it was."""
        try:
            size = self._map.size()
        except OSError as error:
            raise RunFailed(f"{self.path}: can no longer be read ({error.strerror}); {_REMEDY}") from error
        if size < len(self._map):
            raise RunFailed(
                f"{self.path}: was truncated from {len(self._map):,} to {size:,} bytes while it was being read;"
                f" {_REMEDY}"
            )


@dataclass(frozen=True)
class Piece:
    """A stretch of one token file, described without its arrays; picklable.

    dtype: of the ids, "<u2" or "<u4"; count: tokens; offset: bytes before the first. masked: there is a ``.mask`` next
    to the file; documents: the number in the ``.idx`` next to it, None if there is none (files of other programs). Both
    cover the whole file, so a piece with either starts at the beginning of the file. key: hash of its content, for
    derived data in caches. open_end: its last token, the closing eos, is left to the next piece, which starts with
    one.
    """

    path: Path
    dtype: str
    count: int
    offset: int = 0
    masked: bool = False
    documents: int | None = None
    key: str = ""
    open_end: bool = False

    @property
    def size(self) -> int:
        """Tokens in the stream."""
        return self.count - self.open_end

    def mapped(self) -> list[Mapped]:
        """Its file and its mask's, if there is one, newly mapped."""
        return [Mapped(path) for path in ([self.path, self.path.with_suffix(".mask")] if self.masked else [self.path])]

    def tokens(self, files: Sequence[Mapped] = ()) -> np.ndarray:
        """(count,) uint16 or uint32 ids, read-only, of ``mapped`` files or newly mapped; with the closing eos, also if
        the stream continues without it."""
        return (files or self.mapped())[0].array(self.dtype, self.offset, self.count)

    def learned(self, files: Sequence[Mapped] = ()) -> np.ndarray | None:
        """(count,) bool: which tokens count as targets; None: all do."""
        return (files or self.mapped())[1].array("?", 0, self.count) if self.masked else None

    def starts(self) -> np.ndarray | None:
        """(documents + 1,) uint32, newly mapped: positions of the eos before each document and of the closing one;
        None: they have to be searched for."""
        if self.documents is None:
            return None
        return Mapped(self.path.with_suffix(".idx")).array("<u4", 0, self.documents + 1)
