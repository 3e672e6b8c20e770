"""Where a batch's windows come from: tokens cut anywhere, cut consecutively, or whole documents packed.

Every source numbers its windows, and reads those whose numbers it is given. A source for training also maps each
position of its endless sequence to a number: a pure function, so that the data of a step depend only on the seed and
the step. Several threads may read one source.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from hybridlm.data.files.stream import TokenStream
from hybridlm.data.windows.order import IGNORE, keys, permute, shuffled, window_count, window_starts
from hybridlm.data.windows.packed_files import PackedStream
from hybridlm.errors import ConfigError, UserError

BLOCK = 4096  # positions of a mixture
_KEPT = 4  # blocks that are cached


class WindowBatch(NamedTuple):
    """Windows, each array (B, T) int64 and writable. targets: IGNORE where nothing counts; doc_ids: None if a row is
    one text; reference: (B,) float64, of pairs of preferences, see ``TextSplit``."""

    ids: np.ndarray
    targets: np.ndarray
    doc_ids: np.ndarray | None = None
    reference: np.ndarray | None = None


class Windows(Protocol):
    """Numbered windows."""

    numbers: int  # are below this
    seq_len: int  # columns of a window

    def rows(self, chosen: np.ndarray) -> WindowBatch:
        """The windows with the numbers ``chosen`` (B,) int64."""

    def targets(self, chosen: np.ndarray) -> np.ndarray:
        """The number of targets that count in each of these windows, (B,) int64."""


class Source(Windows, Protocol):
    """Numbered windows in an endless order."""

    windows: int  # of one pass, at least 1

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
        """UserError: there is nothing to predict."""
        if len(stream) < 2:
            raise UserError(f"the validation text has {len(stream)} tokens; at least 2 are needed")
        self.seq_len, self.numbers, self._stream = seq_len, -(-(len(stream) - 1) // seq_len), stream

    def rows(self, chosen: np.ndarray) -> WindowBatch:
        ids = np.zeros((len(chosen), self.seq_len), dtype=np.int64)  # padding with any id: its target does not count
        targets = np.full_like(ids, IGNORE)
        for row, first in enumerate((chosen * self.seq_len).tolist()):
            length = min(self.seq_len, len(self._stream) - 1 - first)
            tokens = self._stream.read(first, length + 1)
            ids[row, :length] = tokens[:-1]
            targets[row, :length] = np.where(self._stream.read_learned(first + 1, length), tokens[1:], IGNORE)
        return WindowBatch(ids, targets)

    def targets(self, chosen: np.ndarray) -> np.ndarray:
        counts: np.ndarray = (self.rows(chosen).targets != IGNORE).sum(axis=1)
        return counts


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
        rows = np.empty((3, len(chosen), self.seq_len), dtype=np.int64)
        pieces, places = _located(chosen, self._packed.firsts)
        for row, (piece, place) in enumerate(zip(pieces.tolist(), places.tolist(), strict=True)):
            tokens, learned = self._packed.stream.arrays(piece)
            self._packed.piece(piece).fill(tokens, learned, place, rows[:, row])
        return WindowBatch(rows[0], rows[1], rows[2] if self._isolate else None)

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
        self._windows_of = tuple(parts)
        self.seq_len = parts[0].seq_len
        self.firsts = np.cumsum([0, *(part.numbers for part in parts)], dtype=np.int64)
        self.numbers = int(self.firsts[-1])

    def rows(self, chosen: np.ndarray) -> WindowBatch:
        by_part, back = self._by_part(chosen)
        batches = [part.rows(inside) for part, inside in by_part]
        ids, targets = (np.concatenate(arrays)[back] for arrays in list(zip(*batches, strict=True))[:2])
        doc_ids = [batch.doc_ids for batch in batches if batch.doc_ids is not None]
        return WindowBatch(ids, targets, np.concatenate(doc_ids)[back] if doc_ids else None)

    def targets(self, chosen: np.ndarray) -> np.ndarray:
        by_part, back = self._by_part(chosen)
        counts: np.ndarray = np.concatenate([part.targets(inside) for part, inside in by_part])[back]
        return counts

    def _by_part(self, chosen: np.ndarray) -> tuple[list[tuple[Windows, np.ndarray]], np.ndarray]:
        """The numbers within each part that has some of ``chosen``, and the order that puts their results back."""
        which, inside = _located(chosen, self.firsts)
        parts = [(self._windows_of[k], inside[which == k]) for k in np.unique(which).tolist()]
        return parts, np.argsort(np.argsort(which, kind="stable"))


def shares(weights: Sequence[float]) -> np.ndarray:
    """Places (parts,) int64 of each part in a block: BLOCK x weight over the sum of weights, the largest remainders
    rounded up, and at least 1. ConfigError: more parts than places."""
    if len(weights) > BLOCK:
        raise ConfigError(f"data.parts: {len(weights)} parts; a mixture can have at most {BLOCK}")
    exact = BLOCK * np.array(weights, dtype=np.float64) / sum(weights)
    places = np.maximum(np.floor(exact), 1).astype(np.int64)
    order = np.argsort(places - exact, kind="stable")  # parts below 1 already have more than their share
    missing = BLOCK - int(places.sum())
    places[order[: max(0, missing)]] += 1
    for _ in range(-missing):  # parts below 1 were rounded up: the largest give places
        places[np.argmax(places)] -= 1
    return places


class Mixture(Chain):
    """Several corpora trained on at once, each with its share of the windows; a pass has as many windows as theirs
    together.

    The endless sequence consists of blocks of ``BLOCK`` positions. In every block a part has the same number of places,
    its rounded share; a keyed permutation chooses them. A part's windows come in the order of its own endless sequence,
    without gaps. So the order depends on the seed and the position only, and seeking anywhere costs the same.
    """

    def __init__(self, parts: Sequence[Source], weights: Sequence[float], seed: int) -> None:
        """weights: above 0, one per part; parts as for ``Chain``."""
        super().__init__(parts)
        self._parts, self._seed = tuple(parts), seed
        self._places = shares(weights)
        self._edges = np.cumsum(self._places)
        self.windows = sum(part.windows for part in parts)
        self._block = lru_cache(maxsize=_KEPT)(self._deal_block)

    def choose(self, positions: np.ndarray) -> np.ndarray:
        which, index = self.deal(positions)
        chosen = np.empty_like(index)
        for k, part in enumerate(self._parts):
            mine = which == k
            if mine.any():
                chosen[mine] = self.firsts[k] + part.choose(index[mine])
        return chosen

    def deal(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The part at each of ``positions`` (n,) int64, and the position in that part's sequence; both (n,) int64."""
        blocks, slots = np.divmod(positions, BLOCK)
        which, index = np.empty_like(slots), np.empty_like(slots)
        for block in np.unique(blocks).tolist():
            mine = blocks == block
            parts, ranks = self._block(block)
            which[mine] = parts[slots[mine]]
            index[mine] = block * self._places[which[mine]] + ranks[slots[mine]]
        return which, index

    def _deal_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The part at each place of a block, and its number of earlier places in the block; both (BLOCK,) int64."""
        order = permute(np.arange(BLOCK, dtype=np.int64), BLOCK, keys(self._seed, block, "mixture")[:-1])
        parts = self._edges.searchsorted(order, side="right")
        by_part = np.argsort(parts, kind="stable")
        ranks = np.empty(BLOCK, dtype=np.int64)
        ranks[by_part] = np.arange(BLOCK) - np.repeat(self._edges - self._places, self._places)
        return parts, ranks


def _located(chosen: np.ndarray, firsts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of the stretches that begin at ``firsts`` each number is in, and where in it."""
    which = firsts.searchsorted(chosen, side="right") - 1
    return which, chosen - firsts[which]
