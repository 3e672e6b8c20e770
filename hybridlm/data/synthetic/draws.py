"""Random numbers that depend only on a row's key and their place, for many rows at once.

SplitMix64 (Steele, Lea and Flood 2014): the number at a place is a mix of the key and the place, so no row depends on
the others.
"""

from __future__ import annotations

import hashlib

import numpy as np

from hybridlm.data.windows.order import mix

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def row_keys(purpose: str, numbers: np.ndarray, attempt: int = 0) -> np.ndarray:
    """A key (B,) uint64 for each of ``numbers`` (B,) int64; a different purpose or attempt gives different keys."""
    digest = hashlib.sha256(f"{purpose}/{attempt}".encode()).digest()
    return mix(mix(numbers.astype(np.uint64) * _GOLDEN) ^ np.frombuffer(digest[:8], dtype="<u8"))


class Draws:
    """One stream of numbers for each row; every call takes the next ones."""

    def __init__(self, keys: np.ndarray) -> None:
        """keys: (B,) uint64."""
        self.rows = len(keys)
        self._keys, self._taken = keys, 0

    def bits(self, count: int) -> np.ndarray:
        """(B, count) uint64."""
        places = np.arange(self._taken + 1, self._taken + count + 1, dtype=np.uint64)
        self._taken += count
        return mix(self._keys[:, None] + places * _GOLDEN)

    def below(self, limit: int, count: int) -> np.ndarray:
        """(B, count) int64 of 0 to limit - 1, limit up to 2**31; uneven by less than limit / 2**32."""
        scaled: np.ndarray = ((self.bits(count) >> np.uint64(32)) * np.uint64(limit)) >> np.uint64(32)
        return scaled.astype(np.int64)

    def uniform(self, count: int) -> np.ndarray:
        """(B, count) float64 between 0 and 1, without either."""
        return ((self.bits(count) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53

    def chosen(self, count: int, limit: int) -> np.ndarray:
        """(B, count) int64 of 0 to limit - 1 without replacement, in random order."""
        return _largest(self.bits(limit), count)

    def weighted(self, count: int, weights: np.ndarray) -> np.ndarray:
        """(B, count) int64, places in ``weights`` (n,), as if drawn one after the other by weight without replacement.

        The largest of u ** (1 / weight), as Efraimidis and Spirakis (2006) draw them.
        """
        return _largest(np.log(self.uniform(len(weights))) / weights, count)


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Places (B, count) of the largest values of each row (B, n), the largest first."""
    top = np.argpartition(values, values.shape[1] - count, axis=1)[:, values.shape[1] - count :]
    order = np.argsort(np.take_along_axis(values, top, axis=1), axis=1)[:, ::-1]
    return np.take_along_axis(top, order, axis=1)
