"""Whole documents packed into training windows of one length: which pieces of a token stream stand in which window.

The stream is ``[eos] doc [eos] doc ... [eos]`` (see ``bins``). A document as a training piece is the eos before it, its text and the eos
after it: one pair of input and target per token of the text and one more, so even an empty text gives a pair.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import uuid
import zipfile
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heappop, heappush
from itertools import pairwise
from pathlib import Path

import numpy as np

from hybridlm.config.section import ConfigError
from hybridlm.data.windows import IGNORE

FORMAT_VERSION = 1

# What numpy, zipfile and json raise on a file that is cut off or has wrong bytes in it; a wrong size in an array's header can ask for
# more memory than there is.
_DAMAGE = (OSError, EOFError, ValueError, KeyError, TypeError, RuntimeError, MemoryError, struct.error, zipfile.BadZipFile)


@dataclass(frozen=True, eq=False)  # == on arrays has no one answer
class Packing:
    """Windows of whole pieces, made by ``pack``. A pair is an input token with its target, the token after it."""

    pieces: np.ndarray  # (P, 2) int64: first token, number of pairs; grouped by window, in the order in which they stand in it
    windows: np.ndarray  # (W + 1,) int64: window w holds pieces[windows[w] : windows[w + 1]], at least one
    seq_len: int  # columns of a window

    def __len__(self) -> int:
        return len(self.windows) - 1

    @property
    def efficiency(self) -> float:
        """The share of the columns that hold a pair, over all windows: 1 is no filling at all."""
        return float(self._filled.sum()) / (len(self) * self.seq_len)

    def window(self, tokens: np.ndarray, w: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """``ids``, ``targets`` and ``doc_ids`` of window ``w``, each (seq_len,) int64; ``tokens`` (N,) is the stream, e.g. a memory map.

        ``doc_ids`` counts the window's pieces 0, 1, 2, ... from left to right. The columns left over stand at the right end: ids 0, targets
        IGNORE, doc_ids -1. Pieces of one long document count as different documents: all but the last of them fill a window alone, so each
        is read without what came before it. IndexError: there is no such window.
        """
        if not 0 <= w < len(self):
            raise IndexError(f"window {w} of {len(self)}")
        ids = np.zeros(self.seq_len, dtype=np.int64)  # any id fills up: its target does not count
        targets = np.full(self.seq_len, IGNORE, dtype=np.int64)
        doc_ids = np.full(self.seq_len, -1, dtype=np.int64)
        column = 0
        for number, (first, pairs) in enumerate(self.pieces[self.windows[w] : self.windows[w + 1]].tolist()):
            piece = np.asarray(tokens[first : first + pairs + 1], dtype=np.int64)
            columns = slice(column, column + pairs)
            ids[columns], targets[columns], doc_ids[columns] = piece[:-1], piece[1:], number
            column += pairs
        return ids, targets, doc_ids

    def targets_of(self, windows: np.ndarray) -> int:
        """Number of pairs in ``windows`` (integers below W, any shape) together, one that comes twice counting twice."""
        return int(self._filled[windows].sum())

    @cached_property
    def _filled(self) -> np.ndarray:
        """Pairs of each window (W,) int64; a loader asks for some of them at every step."""
        return np.add.reduceat(self.pieces[:, 1], self.windows[:-1])  # right only because no window is empty

    def save(self, path: str | Path, key: str) -> None:
        """Write to ``path`` (an .npz), whole or not at all; ``key`` says what it was made of, for ``load`` to compare.

        OSError: it cannot be written.
        """
        path = Path(path)
        # The name is this writer's alone, on a file system shared between machines too.
        partial = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
        meta = {"format_version": FORMAT_VERSION, "key": key, "seq_len": self.seq_len, "sha256": self._digest()}
        try:
            with partial.open("wb") as file:  # not synced: what a crash leaves damaged is not loaded
                np.savez(file, meta=np.array(json.dumps(meta)), pieces=self.pieces, windows=self.windows)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path, key: str) -> Packing | None:
        """What ``save`` wrote; None if there is no file, or one that is damaged, of another format or of another ``key``."""
        try:
            # Opened here, as numpy leaves its own handle open where the file is damaged.
            with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                meta = json.loads(arrays["meta"].item())
                if (meta["format_version"], meta["key"]) != (FORMAT_VERSION, key):
                    return None
                packing = cls(arrays["pieces"], arrays["windows"], meta["seq_len"])
                return packing if packing._digest() == meta["sha256"] else None
        except _DAMAGE:
            return None

    def _digest(self) -> str:
        digest = hashlib.sha256(f"{self.seq_len}/{self.pieces.shape}/{self.windows.shape}".encode())
        digest.update(np.ascontiguousarray(self.pieces).data)
        digest.update(np.ascontiguousarray(self.windows).data)
        return digest.hexdigest()


def pack(starts: np.ndarray, seq_len: int) -> Packing:
    """Best-fit decreasing (Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv 2404.10830).

    ``starts`` (D + 1,) of integers, rising: the tokens at which the eos in front of each document stand and, last, the closing eos; so
    document d gives starts[d + 1] - starts[d] pairs. Only a document of more than ``seq_len`` pairs is cut, into pieces of that many pairs
    and a rest: a piece's first input is the last target of the piece before, so no pair is lost. From the longest piece to the shortest,
    each goes whole into the window that has the least room in which it fits, and into a new one if there is none.

    Of pieces of one length the first in the stream comes first, of windows with equal room the one opened first is taken. Pieces within
    a window and windows, by their first piece, stand in the order of the stream, so windows spread evenly over their numbers are spread
    evenly over the text. The same ``starts`` always give the same packing.

    ConfigError: there is no document. ValueError: ``starts`` do not rise or ``seq_len`` is below 1.
    """
    starts = np.asarray(starts, dtype=np.int64)
    if starts.size < 2:
        raise ConfigError("the training text holds no document, so there is nothing to pack into windows")
    if seq_len < 1 or (np.diff(starts) < 1).any():
        raise ValueError(f"seq_len={seq_len} must be at least 1 and the starts of documents must rise")
    pieces = _cut(starts, seq_len)
    falling = np.argsort(-pieces[:, 1], kind="stable")
    opened = np.empty(len(pieces), dtype=np.int64)  # the window of each piece, in the order in which they are opened
    opened[falling] = _best_fit(pieces[falling, 1], seq_len)
    _, first_pieces = np.unique(opened, return_index=True)
    numbers = np.empty_like(first_pieces)
    numbers[np.argsort(first_pieces)] = np.arange(len(first_pieces))
    window_of = numbers[opened]
    windows = np.concatenate([[0], np.cumsum(np.bincount(window_of))]).astype(np.int64)
    return Packing(pieces[np.argsort(window_of, kind="stable")], windows, seq_len)


def _cut(starts: np.ndarray, seq_len: int) -> np.ndarray:
    """All pieces (P, 2) int64, first token and number of pairs, in the order of the stream."""
    counts = -(-np.diff(starts) // seq_len)  # pieces of each document
    before = np.cumsum(counts) - counts  # pieces of all documents in front
    inside = np.arange(counts.sum()) - np.repeat(before, counts)  # number of the piece in its document
    firsts = np.repeat(starts[:-1], counts) + inside * seq_len
    return np.stack([firsts, np.diff(firsts, append=starts[-1])], axis=1)  # the pieces leave no gap


class _OpenWindows:
    """The windows that have room left, by their room: a heap of numbers for every room that occurs, and these rooms in order."""

    def __init__(self) -> None:
        self._heaps: dict[int, list[int]] = {}
        self._rooms: list[int] = []

    def least_room(self, length: int) -> int | None:
        """The least room of a window, at least ``length``; None if there is none."""
        at = bisect_left(self._rooms, length)
        return self._rooms[at] if at < len(self._rooms) else None

    def take(self, room: int, wanted: int) -> list[int]:
        """Remove up to ``wanted`` windows with just this room, lowest numbers first."""
        heap = self._heaps[room]
        if wanted < len(heap):
            return [heappop(heap) for _ in range(wanted)]
        del self._heaps[room], self._rooms[bisect_left(self._rooms, room)]
        return sorted(heap)

    def add(self, room: int, windows: Sequence[int]) -> None:
        if room not in self._heaps:
            self._heaps[room] = []
            insort(self._rooms, room)
        for window in windows:
            heappush(self._heaps[room], window)


def _best_fit(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """Window (P,) int64 of each piece, numbered as they are opened; ``lengths`` (P,) int64 fall.

    All pieces of one length that go into windows of one room are placed at once. The window with the least room takes pieces until none
    fits any more, as each leaves it with still less room, so every window but the last gets as many as it holds. A step empties a room or
    ends a length: at most min(P, seq_len ** 2) steps, each with a search over the rooms that occur, and a heap operation per window.
    """
    window_of = np.empty(len(lengths), dtype=np.int64)
    shortest = int(lengths[-1])
    windows, count = _OpenWindows(), 0
    edges = [0, *(np.flatnonzero(np.diff(lengths)) + 1).tolist(), len(lengths)]
    for done, end in pairwise(edges):
        length = int(lengths[done])
        while done < end:
            room = windows.least_room(length)
            each = (room or seq_len) // length  # pieces that a window takes
            wanted = -(-(end - done) // each)
            taken: Sequence[int]
            if room is None:
                taken, room, count = range(count, count + wanted), seq_len, count + wanted
            else:
                taken = windows.take(room, wanted)
            placed = min(end - done, len(taken) * each)
            window_of[done : done + placed] = np.repeat(taken, each)[:placed]
            done += placed
            full, rest = divmod(placed, each)  # windows that took all they hold, pieces in the last one if that holds more
            for number, group in ((each, taken[:full]), (rest, taken[full:])):
                left = room - number * length
                if group and left >= shortest:  # no piece fits into less
                    windows.add(left, group)
    return window_of
