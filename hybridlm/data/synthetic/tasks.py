"""The tasks: about recalling what was read, and about tracking a state (Deletang et al. 2023).

A task is a function that makes examples of ``length`` tokens, one per row of ``draws``: ids and targets, both
(B, length) int64; targets are -100 where nothing is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from hybridlm.config.synthetic import SyntheticConfig, SyntheticTask
from hybridlm.data.synthetic.draws import Draws
from hybridlm.data.windows.order import IGNORE

Example = tuple[np.ndarray, np.ndarray]
_POWER = 0.01  # Zoology's: a query's position after the pairs is drawn with weight position ** (_POWER - 1)
_PLUS, _MINUS, _TIMES, _EQUALS, _OPEN, _CLOSE = range(1, 7)


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


def parity(section: SyntheticConfig, draws: Draws, length: int) -> Example:
    """Random bits; after each of them: is the number of ones so far odd?

    A state that only decays towards what it reads cannot flip its sign at every one; a rotating state can (Mamba-3,
    Lahoti et al. 2026).
    """
    bits = draws.below(2, length)
    return 1 + bits, 1 + bits.cumsum(axis=1) % 2


def modular_arithmetic(section: SyntheticConfig, draws: Draws, length: int) -> Example:
    """Digits with +, - or * between them, then =, where the result modulo ``modulus`` is asked for; * binds before +
    and -."""
    digits, operators = draws.below(section.modulus, length // 2), _PLUS + draws.below(3, length // 2 - 1)
    ids = np.full((draws.rows, length), _EQUALS, dtype=np.int64)
    ids[:, 0::2], ids[:, 1:-1:2] = 1 + _EQUALS + digits, operators
    total, term = np.zeros(draws.rows, dtype=np.int64), digits[:, 0]
    for operator, digit in zip(operators.T, digits[:, 1:].T, strict=True):
        times = operator == _TIMES
        total = np.where(times, total, total + term)
        term = np.where(times, term * digit % section.modulus, np.where(operator == _MINUS, -digit, digit))
    targets = unasked(ids)
    targets[:, -1] = 1 + _EQUALS + (total + term) % section.modulus
    return ids, targets


def modular_arithmetic_brackets(section: SyntheticConfig, draws: Draws, length: int) -> Example:
    """The same with brackets around every operation and a minus before some digits, so that it takes a stack."""
    ids = np.full((draws.rows, length), _EQUALS, dtype=np.int64)
    targets = unasked(ids)
    for row, numbers in enumerate((draws.bits(2 * length) >> np.uint64(32)).tolist()):
        ids[row, :-1], value = _expression(iter(numbers), length - 1, section.modulus)
        targets[row, -1] = 1 + _CLOSE + value
    return ids, targets


def _expression(numbers: Iterator[int], length: int, modulus: int) -> tuple[list[int], int]:
    """Tokens and value of a random expression of ``length`` tokens; 1: d, 2: -d, 3: (d), 4: (-d), more: (expression op
    expression)."""
    if length < 5:
        digit = next(numbers) % modulus
        tokens, value = [1 + _CLOSE + digit], digit
        if length in (2, 4):
            tokens, value = [_MINUS, *tokens], -digit % modulus
        return ([_OPEN, *tokens, _CLOSE] if length > 2 else tokens), value
    left = 1 + next(numbers) % (length - 4)
    operator = _PLUS + next(numbers) % 3
    before, first = _expression(numbers, left, modulus)
    behind, second = _expression(numbers, length - 3 - left, modulus)
    value = {_PLUS: first + second, _MINUS: first - second, _TIMES: first * second}[operator] % modulus
    return [_OPEN, *before, operator, *behind, _CLOSE], value


class Task(NamedTuple):
    """make: the task's function; answers: the number of targets in an example of so many tokens; even: whether its
    tokens are an even number."""

    make: Callable[[SyntheticConfig, Draws, int], Example]
    answers: Callable[[SyntheticConfig, int], int] = lambda section, length: 1
    even: bool = False


TASKS: dict[SyntheticTask, Task] = {
    "mqar": Task(mqar, lambda section, length: section.n_pairs),
    "copying": Task(copying, lambda section, length: length // 2, even=True),
    "selective_copying": Task(selective_copying, lambda section, length: section.n_items),
    "induction": Task(induction),
    "parity": Task(parity, lambda section, length: length),
    "modular_arithmetic": Task(modular_arithmetic, even=True),
    "modular_arithmetic_brackets": Task(modular_arithmetic_brackets),
    "needle": Task(needle, lambda section, length: section.n_items),
}
