"""The tokens of many files as one stream, of which only what is read is opened.

A stream of a hundred thousand files holds a description of each and its first position. Files are mapped into memory,
read-only, when they are first touched, and only as many at a time as a process can have open: a mapped file takes a
file descriptor.

Touching a page of a mapped file that no longer exists kills the process by a signal (SIGBUS) instead of raising an
exception. So the size of a file is checked before a window is read from it, which takes less than a microsecond.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from hybridlm.errors import RunFailed

_T = TypeVar("_T")
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


def _most_open() -> int:
    """Files to keep open in one process: each takes a file descriptor, or two if there is a mask, and half of all
    descriptors are left to others."""
    try:
        import resource  # not on Windows
    except ImportError:
        return 1024
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return (1 << 16 if allowed == resource.RLIM_INFINITY else min(allowed, 1 << 16)) // 4  # Linux allows 65,530 maps


@lru_cache(maxsize=_most_open())
def _opened(open_it: Callable[[int], Any], piece: int) -> Any:
    return open_it(piece)


def opened(open_it: Callable[[int], tuple[_T, Sequence[Mapped]]], piece: int) -> _T:
    """What ``open_it``, a method of one object, makes of the files beside it, kept open in this process; of too many
    the one that was not used longest is closed.

    RunFailed: one of the files is not what it was.
    """
    found: tuple[_T, Sequence[Mapped]] = _opened(open_it, piece)
    for file in found[1]:
        file.refuse_cut()
    return found[0]


def joined(pieces: Iterable[Piece]) -> list[Piece]:
    """Whole files joined into one stream: a file of ours ends with an eos, and the next one of ours begins with
    one."""
    whole = list(pieces)
    ours = [piece.documents is not None for piece in whole] + [False]
    return [replace(piece, open_end=ours[place] and ours[place + 1]) for place, piece in enumerate(whole)]


class Arrays(NamedTuple):
    """The arrays of one piece, (count,) with the closing eos, see ``Piece``."""

    tokens: np.ndarray
    learned: np.ndarray | None


class TokenStream:
    """Pieces one after the other, read at any position in O(log pieces)."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        """ValueError: there is no piece, or only some have a mask."""
        if not pieces or len({piece.masked for piece in pieces}) > 1:
            raise ValueError("a stream needs at least one piece, and either all or none with a mask")
        self.pieces = tuple(pieces)
        self.masked = pieces[0].masked
        # (pieces + 1,): where each begins, and the end
        self._sizes = [piece.size for piece in pieces]
        self.firsts = np.cumsum([0, *self._sizes], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def read(self, first: int, count: int) -> np.ndarray:
        """Tokens [first, first + count) as (count,) int64. IndexError: out of range."""
        return self.windows(np.array([first], dtype=np.int64), count).reshape(count)

    def read_learned(self, first: int, count: int) -> np.ndarray:
        """Which of these tokens are learned, (count,) bool."""
        return self.learned_windows(np.array([first], dtype=np.int64), count).reshape(count)

    def windows(self, firsts: np.ndarray, length: int) -> np.ndarray:
        """Tokens [first, first + length) of each of ``firsts`` (B,) int64, as (B, length) int64. IndexError: out of
        range."""
        out = np.empty((len(firsts), length), dtype=np.int64)
        self._fill(out, firsts, 0)
        return out

    def learned_windows(self, firsts: np.ndarray, length: int) -> np.ndarray:
        """Which of these tokens are learned, (B, length) bool."""
        out = np.ones((len(firsts), length), dtype=bool)
        if self.masked:
            self._fill(out, firsts, 1)
        return out

    def arrays(self, piece: int) -> Arrays:
        """The memory-mapped arrays of one of the pieces."""
        return opened(self._open, piece)

    def _open(self, piece: int) -> tuple[Arrays, Sequence[Mapped]]:
        this = self.pieces[piece]
        files = this.mapped()
        return Arrays(this.tokens(files), this.learned(files)), files

    def _fill(self, out: np.ndarray, firsts: np.ndarray, field: int) -> None:
        """field: 0 for tokens, 1 for learned, as in ``Arrays``."""
        length = out.shape[1]
        if len(firsts) and not 0 <= int(firsts.min()) <= int(firsts.max()) <= len(self) - length:
            raise IndexError(f"windows of {length} tokens reach beyond a stream of {len(self)}")
        pieces = self.firsts.searchsorted(firsts, side="right") - 1
        for row, piece, place in zip(out, pieces.tolist(), (firsts - self.firsts[pieces]).tolist(), strict=True):
            done = 0
            while done < length:  # once, nearly always
                whole = self.arrays(piece)[field]
                assert whole is not None  # masks are read of masked streams only
                found = whole[place : min(place + length - done, self._sizes[piece])]
                row[done : done + found.size] = found
                done, place, piece = done + found.size, 0, piece + 1
