"""Tasks about tracking a state (Deletang et al. 2023); see ``recall`` for what they return."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hybridlm.config.synthetic import SyntheticConfig
from hybridlm.data.synthetic.draws import Draws
from hybridlm.data.synthetic.recall import Example, unasked

_PLUS, _MINUS, _TIMES, _EQUALS, _OPEN, _CLOSE = range(1, 7)


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
