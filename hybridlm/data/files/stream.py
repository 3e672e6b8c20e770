"""The tokens of many files as one stream, of which only what is read is opened.

A stream of a hundred thousand files holds a description of each and the place where it begins. Files are mapped into
memory when they are first touched, and so many at a time as a process may well have open: a mapped file takes a file
descriptor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from hybridlm.data.files.bins import TokenFile
from hybridlm.data.files.mapped import Mapped

_T = TypeVar("_T")


def _most_open() -> int:
    """Things to keep open in one process: each takes a file descriptor, or two where there is a mask, and half of all
    are to be left."""
    try:
        import resource  # not on Windows
    except ImportError:
        return 1024
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return (1 << 16 if allowed == resource.RLIM_INFINITY else min(allowed, 1 << 16)) // 4  # Linux allows 65,530 maps


_MOST_OPEN = _most_open()
_opened: dict[Hashable, Any] = {}  # of this process, the oldest first


def opened(key: Hashable, open_it: Callable[[], tuple[_T, Sequence[Mapped]]]) -> _T:
    """What ``open_it`` made of the files beside it when ``key`` was last opened in this process; the oldest of too many
    is forgotten.

    RunFailed: one of the files is not what it was.
    """
    found: tuple[_T, Sequence[Mapped]] | None = _opened.get(key)
    if found is None:
        if len(_opened) >= _MOST_OPEN:
            del _opened[next(iter(_opened))]
        found = _opened[key] = open_it()
    for file in found[1]:
        file.refuse_cut()
    return found[0]


@dataclass(frozen=True)
class Piece:
    """A stretch of one token file: what it is, not its arrays, so that it can be sent to another process.

    dtype: of the ids, "<u2" or "<u4"; count: tokens; offset: bytes before the first. masked: the file has a ``.mask``
    beside it; documents: as many are in the ``.idx`` beside it, None if it has none (files of other programs). Both
    speak of the whole file, so a piece that has one begins with the file. key: hash of its content, for what is made of
    it and kept. open_end: the last of its tokens, the eos that closes it, is left to the next piece, which begins with
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
        """Its file and, where there is one, its mask's, mapped anew."""
        return [Mapped(path) for path in ([self.path, self.path.with_suffix(".mask")] if self.masked else [self.path])]

    def tokens(self, files: Sequence[Mapped] = ()) -> np.ndarray:
        """(count,) ids, of ``mapped`` files or mapped anew; with the closing eos, also where the stream goes on without
        it."""
        return (files or self.mapped())[0].array(self.dtype, self.offset, self.count)

    def learned(self, files: Sequence[Mapped] = ()) -> np.ndarray | None:
        """(count,) bool of the same: which tokens count as targets; None: all do."""
        return (files or self.mapped())[1].array("?", 0, self.count) if self.masked else None

    def starts(self) -> np.ndarray | None:
        """(documents + 1,) uint32, mapped anew: the eos before each document and the closing one; None: they have to be
        looked for."""
        return (
            None
            if self.documents is None
            else Mapped(self.path.with_suffix(".idx")).array("<u4", 0, self.documents + 1)
        )


def split_of(files: Iterable[TokenFile]) -> TokenStream:
    """The stream of token files of ours, in order; all but the last leave their closing eos to the next. ValueError:
    there is none."""
    pieces = [
        Piece(
            file.path,
            file.meta.dtype,
            file.meta.count,
            masked=file.meta.masked,
            documents=file.meta.documents,
            key=hashlib.sha256(json.dumps(file.meta.sha256, sort_keys=True).encode()).hexdigest(),
            open_end=True,
        )
        for file in files
    ]
    return TokenStream([*pieces[:-1], *(replace(piece, open_end=False) for piece in pieces[-1:])])


class Arrays(NamedTuple):
    """Of one piece. tokens, learned: (size,), see ``Piece``; closed, closed_learned: the same with the closing eos,
    (count,)."""

    tokens: np.ndarray
    learned: np.ndarray | None
    closed: np.ndarray
    closed_learned: np.ndarray | None


class TokenStream:
    """Pieces one after the other, read at any place in O(log pieces)."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        """ValueError: there is none, or some have a mask and others none."""
        if not pieces or len({piece.masked for piece in pieces}) > 1:
            raise ValueError("a stream takes one piece or more, all with a mask or all without")
        self.pieces = tuple(pieces)
        self.masked = pieces[0].masked
        self.firsts = np.cumsum(
            [0, *(piece.size for piece in pieces)], dtype=np.int64
        )  # (pieces + 1,): where each begins, and the end
        self._identity = object()  # a file may change between two streams over it

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def read(self, first: int, count: int) -> np.ndarray:
        """Tokens [first, first + count) as (count,) int64. IndexError: not all of them are there."""
        return self.windows(np.array([first], dtype=np.int64), count).reshape(count)

    def read_learned(self, first: int, count: int) -> np.ndarray:
        """Which of the same tokens are learned, (count,) bool."""
        return self.learned_windows(np.array([first], dtype=np.int64), count).reshape(count)

    def windows(self, firsts: np.ndarray, length: int) -> np.ndarray:
        """Tokens [first, first + length) of each of ``firsts`` (B,) int64, as (B, length) int64. IndexError: not all of
        them are there."""
        out = np.empty((len(firsts), length), dtype=np.int64)
        self._fill(out, firsts, lambda piece: self.arrays(piece).tokens)
        return out

    def learned_windows(self, firsts: np.ndarray, length: int) -> np.ndarray:
        """Which of the same tokens are learned, (B, length) bool."""
        out = np.ones((len(firsts), length), dtype=bool)
        if self.masked:
            self._fill(out, firsts, self._learned)
        return out

    def arrays(self, piece: int) -> Arrays:
        """The memory-mapped arrays of one of the pieces."""
        return opened((self._identity, piece), lambda: self._open(piece))

    def _open(self, piece: int) -> tuple[Arrays, Sequence[Mapped]]:
        this = self.pieces[piece]
        files = this.mapped()
        tokens, learned = this.tokens(files), this.learned(files)
        return Arrays(tokens[: this.size], None if learned is None else learned[: this.size], tokens, learned), files

    def _learned(self, piece: int) -> np.ndarray:
        learned = self.arrays(piece).learned
        assert learned is not None  # the stream is masked
        return learned

    def _fill(self, out: np.ndarray, firsts: np.ndarray, array_of: Callable[[int], np.ndarray]) -> None:
        length = out.shape[1]
        if len(firsts) and not 0 <= int(firsts.min()) <= int(firsts.max()) <= len(self) - length:
            raise IndexError(f"windows of {length} tokens reach beyond a stream of {len(self)}")
        pieces = self.firsts.searchsorted(firsts, side="right") - 1
        for row, piece, place in zip(out, pieces.tolist(), (firsts - self.firsts[pieces]).tolist(), strict=True):
            found = array_of(piece)[place : place + length]
            if found.size == length:  # nearly always
                row[:] = found
                continue
            done = 0
            while True:
                row[done : done + found.size] = found
                done += found.size
                if done == length:
                    break
                piece += 1
                found = array_of(piece)[: length - done]
