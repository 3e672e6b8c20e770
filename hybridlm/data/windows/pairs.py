"""Pairs of preferences as windows: two rows each, the chosen conversation and the rejected one."""

from __future__ import annotations

import numpy as np

from hybridlm.data.corpus import TextSplit
from hybridlm.data.windows.order import IGNORE, shuffled
from hybridlm.data.windows.window_sources import WindowBatch
from hybridlm.errors import ConfigError


class PairWindows:
    """The pairs of which both conversations fit into ``seq_len`` columns, in a different order in each pass; a stream
    holds the two of a pair one after the other.

    ``rows`` gives two rows for each number, the chosen one first, padded at the right. A number counts as one target.
    too_long: pairs that are left out.
    """

    def __init__(self, split: TextSplit, seq_len: int, seed: int) -> None:
        """ConfigError: no pair fits."""
        found = []
        for number, piece in enumerate(split.stream.pieces):
            starts = piece.starts()
            assert starts is not None  # token files of ours
            borders = starts.astype(np.int64)
            whole = np.stack([borders[:-2:2], borders[1:-1:2], borders[2::2]], axis=1)
            found.append(np.insert(whole, 0, number, axis=1))
        pairs = np.concatenate(found)  # (P, 4): the piece, the eos before each of the two, and the one behind them
        fits = np.diff(pairs[:, 1:], axis=1).max(axis=1) - 1 <= seq_len
        self._pairs, self.too_long = pairs[fits], int((~fits).sum())
        self.windows = self.numbers = len(self._pairs)
        if not self.windows:
            raise ConfigError(f"data.seq_len = {seq_len}: none of {len(pairs):,} pairs fits; raise it")
        self.seq_len, self._stream, self._seed, self._reference = seq_len, split.stream, seed, split.reference

    def choose(self, positions: np.ndarray) -> np.ndarray:
        return shuffled(positions, count=self.windows, seed=self._seed)

    def rows(self, chosen: np.ndarray) -> WindowBatch:
        ids = np.zeros((2 * len(chosen), self.seq_len), dtype=np.int64)
        targets = np.full_like(ids, IGNORE)
        for row, (piece, first, middle, end) in enumerate(self._pairs[chosen].tolist()):
            tokens, learned = self._stream.arrays(piece)
            assert learned is not None  # preferences are conversations
            for line, begin, stop in ((2 * row, first, middle), (2 * row + 1, middle, end)):
                length = stop - begin - 1
                ids[line, :length] = tokens[begin : stop - 1]
                counts = np.flatnonzero(learned[begin + 1 : stop])
                targets[line, counts] = tokens[begin + 1 : stop][counts]
        reference = None if self._reference is None else self._reference[chosen].reshape(-1)
        return WindowBatch(ids, targets, reference=reference)

    def targets(self, chosen: np.ndarray) -> np.ndarray:
        return np.ones(len(chosen), dtype=np.int64)
