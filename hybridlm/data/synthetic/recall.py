"""Tasks about recalling what was read."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from hybridlm.config.synthetic import SyntheticConfig
from hybridlm.data.synthetic.draws import Draws
from hybridlm.data.windows.order import IGNORE

Example = tuple[np.ndarray, np.ndarray]
_POWER = 0.01  # Zoology's: a query's position after the pairs is drawn with weight position ** (_POWER - 1)


class Task(ABC):
    """A kind of example."""

    def __init__(self, section: SyntheticConfig) -> None:
        self.symbols, self.pairs, self.items = section.vocab_size, section.n_pairs, section.n_items
        self.modulus = section.modulus

    def fit(self, length: int) -> int:
        """Tokens of the longest example that is no longer than ``length``."""
        return length

    def answers(self, length: int) -> int:
        """Number of targets in an example of ``length`` tokens, a length that ``fit`` returns."""
        return 1

    @abstractmethod
    def make(self, draws: Draws, length: int) -> Example:
        """ids and targets, both (B, length) int64, one example per row of ``draws``; targets are -100 where nothing is
        asked."""


def unasked(ids: np.ndarray) -> np.ndarray:
    """Targets in the shape of ``ids`` that ask for nothing."""
    return np.full_like(ids, IGNORE)


class MQAR(Task):
    """Multi-query associative recall (Arora et al. 2023, Zoology): key-value pairs, then each key once more, likelier
    close to them, where its value is asked for; all other positions hold random symbols."""

    def fit(self, length: int) -> int:
        return length

    def answers(self, length: int) -> int:
        return self.pairs

    def make(self, draws: Draws, length: int) -> Example:
        keys_of, context = self.symbols // 2, 2 * self.pairs
        keys = 1 + draws.chosen(self.pairs, keys_of)
        values = 1 + keys_of + draws.chosen(self.pairs, self.symbols - keys_of)
        ids = 1 + draws.below(self.symbols, length)
        ids[:, 0:context:2], ids[:, 1:context:2] = keys, values
        places = np.arange(1, (length - context) // 2 + 1, dtype=np.float64)
        asked = context + 2 * draws.weighted(self.pairs, places ** (_POWER - 1))
        targets = unasked(ids)
        np.put_along_axis(ids, asked, keys, axis=1)
        np.put_along_axis(targets, asked, values, axis=1)
        return ids, targets


class Copying(Task):
    """Random symbols, a marker, and the same symbols again, each asked for after the one before it."""

    def fit(self, length: int) -> int:
        return length - length % 2

    def answers(self, length: int) -> int:
        return length // 2

    def make(self, draws: Draws, length: int) -> Example:
        block = 2 + draws.below(self.symbols, length // 2)
        marker = np.ones((draws.rows, 1), dtype=np.int64)
        ids = np.concatenate([block, marker, block[:, :-1]], axis=1)
        targets = unasked(ids)
        targets[:, length // 2 :] = block
        return ids, targets


class SelectiveCopying(Task):
    """Symbols at random positions among blanks, then as many question marks, at each of which the next symbol is asked
    for (Gu and Dao 2023)."""

    def fit(self, length: int) -> int:
        return length

    def answers(self, length: int) -> int:
        return self.items

    def make(self, draws: Draws, length: int) -> Example:
        context = length - self.items
        items = 3 + draws.below(self.symbols, self.items)
        ids = np.ones((draws.rows, length), dtype=np.int64)
        np.put_along_axis(ids, np.sort(draws.chosen(self.items, context), axis=1), items, axis=1)
        ids[:, context:] = 2
        targets = unasked(ids)
        targets[:, context:] = items
        return ids, targets


class Induction(Task):
    """Random symbols, and somewhere among them a marker; at its second occurrence, which ends the example, the symbol
    that followed the first is asked for (Fu et al. 2023; Gu and Dao 2023)."""

    def make(self, draws: Draws, length: int) -> Example:
        ids = 2 + draws.below(self.symbols, length)
        place = draws.below(length - 2, 1)
        answer = np.take_along_axis(ids, place + 1, axis=1)
        np.put_along_axis(ids, place, 1, axis=1)
        ids[:, -1] = 1
        targets = unasked(ids)
        targets[:, -1:] = answer
        return ids, targets


class Needle(Task):
    """Needles at random positions in random symbols: a marker, a key, and the symbols of its value. At the end one of
    the keys is given, and the symbols of its value are asked for one after the other. With one needle it is the passkey
    task (Mohtashami and Jaggi 2023)."""

    def fit(self, length: int) -> int:
        return length

    def answers(self, length: int) -> int:
        return self.items

    def make(self, draws: Draws, length: int) -> Example:
        width, body = 2 + self.items, length - self.items - 1
        free = body - self.pairs * width
        ids = 3 + draws.below(self.symbols, length)
        keys = 3 + draws.chosen(self.pairs, self.symbols)
        values = 3 + draws.below(self.symbols, self.pairs * self.items).reshape(draws.rows, self.pairs, self.items)
        # A row of needles and free positions: which of these are needles, then widened to the needles' width.
        first = np.sort(draws.chosen(self.pairs, free + self.pairs), axis=1) + np.arange(self.pairs) * (width - 1)
        np.put_along_axis(ids, first, 1, axis=1)
        np.put_along_axis(ids, first + 1, keys, axis=1)
        for place in range(self.items):
            np.put_along_axis(ids, first + 2 + place, values[:, :, place], axis=1)
        which = draws.below(self.pairs, 1)
        answer = np.take_along_axis(values, which[:, :, None], axis=1)[:, 0]
        ids[:, body] = 2
        ids[:, body + 1 : body + 2] = np.take_along_axis(keys, which, axis=1)
        ids[:, body + 2 :] = answer[:, :-1]
        targets = unasked(ids)
        targets[:, body + 1 :] = answer
        return ids, targets
