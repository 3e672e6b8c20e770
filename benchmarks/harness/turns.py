"""Contenders timed in turn inside one process, and the ratios of their times round by round.

On a shared machine a time alone says little: the neighbours' load moves it by more than what is to be measured. What
two contenders take in the same round moves together, so the ratio is taken there; its median is the result and its
range shows how far to trust it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

MIN_ROUNDS = 15  # fewer are for a look only and are not written to results/


class LeftOut(Exception):
    """A contender or a measurement that this machine cannot have; the message says why."""


@dataclass(frozen=True)
class Ratio:
    """Median, smallest and largest over the rounds."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Ratio:
        return Ratio(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


class Times:
    """Seconds of every contender in every round that counts."""

    def __init__(self, seconds: dict[str, list[float]]) -> None:
        self.seconds = seconds

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, slow: str, fast: str) -> Ratio:
        """Time of ``slow`` over that of ``fast`` in the same round."""
        return Ratio.of([a / b for a, b in zip(self.seconds[slow], self.seconds[fast], strict=True)])

    def fastest(self, names: Sequence[str]) -> str:
        return min(names, key=self.median)


def take_turns(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    calls: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Calls the contenders one after the other, ``calls`` times in each round, in reverse order every second time.

    A round's time is that of its calls together. The first round warms up and is dropped.
    """
    seconds: dict[str, list[float]] = {name: [0.0] * (rounds + 1) for name in contenders}
    for call in range((rounds + 1) * calls):
        for name in reversed(list(contenders)) if call % 2 else list(contenders):
            start = clock()
            contenders[name]()
            seconds[name][call // calls] += clock() - start
    return Times({name: measured[1:] for name, measured in seconds.items()})
