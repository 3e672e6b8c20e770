"""Several corpora trained on at once, each with its share of the windows.

The endless sequence of a mixture consists of blocks of ``BLOCK`` positions. In every block a part has the same number
of places, its rounded share; a keyed permutation chooses them. A part's windows come in the order of its own endless
sequence, without gaps. So the order depends on the seed and the position only, and seeking anywhere costs the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from hybridlm.data.windows.order import keys, permute
from hybridlm.data.windows.window_sources import Chain, Source
from hybridlm.errors import ConfigError

BLOCK = 4096  # positions
_KEPT = 4  # blocks that are cached


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
    """One source made of several; a pass has as many windows as theirs together."""

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
