"""Tasks about recalling what was read.

A task is a function that makes examples of ``length`` tokens, one per row of ``draws``: ids and targets, both
(B, length) int64; targets are -100 where nothing is asked.
"""

from __future__ import annotations

import numpy as np

from hybridlm.config.synthetic import SyntheticConfig
from hybridlm.data.synthetic.draws import Draws
from hybridlm.data.windows.order import IGNORE

Example = tuple[np.ndarray, np.ndarray]
_POWER = 0.01  # Zoology's: a query's position after the pairs is drawn with weight position ** (_POWER - 1)


def unasked(ids: np.ndarray) -> np.ndarray:
    """Targets in the shape of ``ids`` that ask for nothing."""
    return np.full_like(ids, IGNORE)


def mqar(section: SyntheticConfig, draws: Draws, length: int) -> Example:
    """Multi-query associative recall (Arora et al. 2023, Zoology): key-value pairs, then each key once more, likelier
    close to them, where its value is asked for; all other positions hold random symbols."""
    keys_of, context = section.vocab_size // 2, 2 * section.n_pairs
    keys = 1 + draws.chosen(section.n_pairs, keys_of)
    values = 1 + keys_of + draws.chosen(section.n_pairs, section.vocab_size - keys_of)
    ids = 1 + draws.below(section.vocab_size, length)
    ids[:, 0:context:2], ids[:, 1:context:2] = keys, values
    places = np.arange(1, (length - context) // 2 + 1, dtype=np.float64)
    asked = context + 2 * draws.weighted(section.n_pairs, places ** (_POWER - 1))
    targets = unasked(ids)
    np.put_along_axis(ids, asked, keys, axis=1)
    np.put_along_axis(targets, asked, values, axis=1)
    return ids, targets


def copying(section: SyntheticConfig, draws: Draws, length: int) -> Example:
    """Random symbols, a marker, and the same symbols again, each asked for after the one before it."""
    block = 2 + draws.below(section.vocab_size, length // 2)
    ids = np.concatenate([block, np.ones((draws.rows, 1), dtype=np.int64), block[:, :-1]], axis=1)
    targets = unasked(ids)
    targets[:, length // 2 :] = block
    return ids, targets


def selective_copying(section: SyntheticConfig, draws: Draws, length: int) -> Example:
    """Symbols at random positions among blanks, then as many question marks, at each of which the next symbol is asked
    for (Gu and Dao 2023)."""
    context = length - section.n_items
    items = 3 + draws.below(section.vocab_size, section.n_items)
    ids = np.ones((draws.rows, length), dtype=np.int64)
    np.put_along_axis(ids, np.sort(draws.chosen(section.n_items, context), axis=1), items, axis=1)
    ids[:, context:] = 2
    targets = unasked(ids)
    targets[:, context:] = items
    return ids, targets


def induction(section: SyntheticConfig, draws: Draws, length: int) -> Example:
    """Random symbols, and somewhere among them a marker; at its second occurrence, which ends the example, the symbol
    that followed the first is asked for (Fu et al. 2023; Gu and Dao 2023)."""
    ids = 2 + draws.below(section.vocab_size, length)
    place = draws.below(length - 2, 1)
    targets = unasked(ids)
    targets[:, -1:] = np.take_along_axis(ids, place + 1, axis=1)
    np.put_along_axis(ids, place, 1, axis=1)
    ids[:, -1] = 1
    return ids, targets


def needle(section: SyntheticConfig, draws: Draws, length: int) -> Example:
    """Needles at random positions in random symbols: a marker, a key, and the symbols of its value. At the end one of
    the keys is given, and the symbols of its value are asked for one after the other. With one needle it is the passkey
    task (Mohtashami and Jaggi 2023)."""
    symbols, count, items = section.vocab_size, section.n_pairs, section.n_items
    width, body = 2 + items, length - items - 1
    ids = 3 + draws.below(symbols, length)
    keys = 3 + draws.chosen(count, symbols)
    values = 3 + draws.below(symbols, count * items).reshape(draws.rows, count, items)
    needles = np.concatenate([np.ones_like(keys)[:, :, None], keys[:, :, None], values], axis=2)
    # A row of needles and free positions: which of these are needles, then widened to the needles' width.
    free = body - count * width
    first = np.sort(draws.chosen(count, free + count), axis=1) + np.arange(count) * (width - 1)
    places = first[:, :, None] + np.arange(width)
    np.put_along_axis(ids, places.reshape(draws.rows, -1), needles.reshape(draws.rows, -1), axis=1)
    asked = np.take_along_axis(needles, draws.below(count, 1)[:, :, None], axis=1)[:, 0]
    ids[:, body], ids[:, body + 1 :] = 2, asked[:, 1:-1]
    targets = unasked(ids)
    targets[:, body + 1 :] = asked[:, 2:]
    return ids, targets
