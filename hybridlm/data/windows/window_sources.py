"""Where a batch's windows come from: tokens cut anywhere, cut consecutively, or whole documents packed.

Every source numbers its windows, and reads those whose numbers it is given. A source for training also maps each
position of its endless sequence to a number: a pure function, so that the data of a step depend only on the seed and
the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from hybridlm.data.files.stream import TokenStream
from hybridlm.data.windows.order import IGNORE, shuffled, validation_count, window_count, window_starts
from hybridlm.data.windows.packed_files import PackedStream


class WindowBatch(NamedTuple):
    """Windows, each array (B, T) int64 and writable. targets: IGNORE where nothing counts; doc_ids: None if a row is
    one text."""

    ids: np.ndarray
    targets: np.ndarray
    doc_ids: np.ndarray | None = None


class Windows(Protocol):
    """Numbered windows; picklable."""

    @property
    def numbers(self) -> int:
        """Numbers are below this."""

    @property
    def seq_len(self) -> int:
        """Columns of a window."""

    def rows(self, chosen: np.ndarray) -> WindowBatch:
        """The windows with the numbers ``chosen`` (B,) int64."""

    def targets(self, chosen: np.ndarray) -> np.ndarray:
        """The number of targets that count in each of these windows, (B,) int64."""


class Source(Windows, Protocol):
    """Numbered windows in an endless order."""

    @property
    def windows(self) -> int:
        """Windows of one pass, at least 1."""

    def choose(self, positions: np.ndarray) -> np.ndarray:
        """The numbers (int64) of the windows at ``positions`` (n,) int64 of the endless sequence."""


class CutWindows:
    """Windows cut anywhere in a stream, with a different phase and order in each pass. A window's number is its first
    token."""

    def __init__(self, stream: TokenStream, seq_len: int, seed: int) -> None:
        """ConfigError: the stream is shorter than a window."""
        self.windows = window_count(len(stream), seq_len)
        self.seq_len, self.numbers = seq_len, len(stream) - seq_len
        self._stream, self._seed = stream, seed

    def choose(self, positions: np.ndarray) -> np.ndarray:
        return window_starts(positions, n_tokens=len(self._stream), seq_len=self.seq_len, seed=self._seed)

    def rows(self, chosen: np.ndarray) -> WindowBatch:
        tokens = self._stream.windows(chosen, self.seq_len + 1)
        targets = np.ascontiguousarray(tokens[:, 1:])
        if self._stream.masked:
            targets[~self._stream.learned_windows(chosen + 1, self.seq_len)] = IGNORE
        return WindowBatch(np.ascontiguousarray(tokens[:, :-1]), targets)

    def targets(self, chosen: np.ndarray) -> np.ndarray:
        if not self._stream.masked:
            return np.full(len(chosen), self.seq_len, dtype=np.int64)
        counts: np.ndarray = self._stream.learned_windows(chosen + 1, self.seq_len).sum(axis=1, dtype=np.int64)
        return counts


class SideBySide:
    """The consecutive windows of a stream: every token except the first is a target once. The last window may be
    padded."""

    def __init__(self, stream: TokenStream, seq_len: int) -> None:
        """ConfigError: there is nothing to predict."""
        self.seq_len, self.numbers, self._stream = seq_len, validation_count(len(stream), seq_len), stream

    def rows(self, chosen: np.ndarray) -> WindowBatch:
        ids = np.zeros((len(chosen), self.seq_len), dtype=np.int64)  # padding with any id: its target does not count
        targets = np.full_like(ids, IGNORE)
        for row, number in enumerate(chosen.tolist()):
            first, length = self._place(number)
            tokens = self._stream.read(first, length + 1)
            ids[row, :length] = tokens[:-1]
            targets[row, :length] = np.where(self._stream.read_learned(first + 1, length), tokens[1:], IGNORE)
        return WindowBatch(ids, targets)

    def targets(self, chosen: np.ndarray) -> np.ndarray:
        places = [self._place(number) for number in chosen.tolist()]
        return np.array(
            [self._stream.read_learned(first + 1, length).sum() for first, length in places], dtype=np.int64
        )

    def _place(self, number: int) -> tuple[int, int]:
        first = number * self.seq_len
        return first, min(self.seq_len, len(self._stream) - 1 - first)


class PackedWindows:
    """Windows of whole documents, in a different order in each pass."""

    def __init__(self, packed: PackedStream, seed: int, *, isolate: bool) -> None:
        """isolate: give the document of each token (doc_ids)."""
        self.windows = self.numbers = len(packed)
        self.seq_len = packed.seq_len
        self._packed, self._seed, self._isolate = packed, seed, isolate

    def choose(self, positions: np.ndarray) -> np.ndarray:
        return shuffled(positions, count=self.windows, seed=self._seed)

    def rows(self, chosen: np.ndarray) -> WindowBatch:
        shape = (len(chosen), self.seq_len)
        ids, targets = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.int64)
        doc_ids = np.empty(shape, dtype=np.int64) if self._isolate else None
        pieces, places = _located(chosen, self._packed.firsts)
        for row, (piece, place) in enumerate(zip(pieces.tolist(), places.tolist(), strict=True)):
            arrays = self._packed.stream.arrays(piece)
            self._packed.piece(piece).fill(
                arrays.closed,
                arrays.closed_learned,
                place,
                ids[row],
                targets[row],
                None if doc_ids is None else doc_ids[row],
            )
        return WindowBatch(ids, targets, doc_ids)

    def targets(self, chosen: np.ndarray) -> np.ndarray:
        pieces, places = _located(chosen, self._packed.firsts)
        counts = np.empty(len(chosen), dtype=np.int64)
        for piece in np.unique(pieces).tolist():
            mine = pieces == piece
            counts[mine] = self._packed.piece(piece).targets[places[mine]]
        return counts


class Chain:
    """The windows of several sources, numbered one source after the other."""

    def __init__(self, parts: Sequence[Windows]) -> None:
        """parts: one or more, with windows of one length, all with doc_ids or all without."""
        self._parts = tuple(parts)
        self.seq_len = parts[0].seq_len
        self.firsts = np.cumsum([0, *(part.numbers for part in parts)], dtype=np.int64)
        self.numbers = int(self.firsts[-1])

    def rows(self, chosen: np.ndarray) -> WindowBatch:
        which, inside = _located(chosen, self.firsts)
        groups = [
            (which == k, part.rows(inside[which == k])) for k, part in enumerate(self._parts) if (which == k).any()
        ]
        if len(groups) == 1:
            return groups[0][1]
        ids, targets = (np.empty((len(chosen), self.seq_len), dtype=np.int64) for _ in range(2))
        doc_ids = None if groups[0][1].doc_ids is None else np.empty_like(ids)
        for mine, rows in groups:
            ids[mine], targets[mine] = rows.ids, rows.targets
            if doc_ids is not None and rows.doc_ids is not None:
                doc_ids[mine] = rows.doc_ids
        return WindowBatch(ids, targets, doc_ids)

    def targets(self, chosen: np.ndarray) -> np.ndarray:
        which, inside = _located(chosen, self.firsts)
        counts = np.empty(len(chosen), dtype=np.int64)
        for k, part in enumerate(self._parts):
            counts[which == k] = part.targets(inside[which == k])
        return counts


def _located(chosen: np.ndarray, firsts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of the stretches that begin at ``firsts`` each number is in, and where in it."""
    which = firsts.searchsorted(chosen, side="right") - 1
    return which, chosen - firsts[which]
