"""The tokens of many files as one stream, of which only what is read is opened.

A stream of a hundred thousand files holds a description of each and its first position. Files are mapped into memory
when they are first touched, and only as many at a time as a process can have open: a mapped file takes a file
descriptor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np

from hybridlm.data.files.mapped import Mapped, Piece

_T = TypeVar("_T")


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
        self.firsts = np.cumsum([0, *(piece.size for piece in pieces)], dtype=np.int64)

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
                found = whole[place : min(place + length - done, self.pieces[piece].size)]
                row[done : done + found.size] = found
                done, place, piece = done + found.size, 0, piece + 1
