"""Means over seeds, their spread, and when a difference is none."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Of the finite ones of some numbers: mean, standard deviation (n - 1 in the denominator; None for fewer than two),
    and how many."""

    mean: float
    deviation: float | None
    n: int


def spread(values: Iterable[float]) -> Spread | None:
    """None where no value is finite."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    mean = math.fsum(finite) / len(finite)
    if len(finite) == 1:
        return Spread(mean, None, 1)
    return Spread(mean, math.sqrt(math.fsum((value - mean) ** 2 for value in finite) / (len(finite) - 1)), len(finite))


def pooled(spreads: Iterable[Spread]) -> float | None:
    """The standard deviation within points: the root of the mean variance, weighed by n - 1. None where none was
    repeated."""
    repeated = [(one.deviation, one.n - 1) for one in spreads if one.deviation is not None]
    if not repeated:
        return None
    return math.sqrt(
        math.fsum(deviation**2 * freedom for deviation, freedom in repeated) / sum(freedom for _, freedom in repeated)
    )


@dataclass(frozen=True)
class Difference:
    """value: of the means. within: the pooled spread that it is held against; None: unknown, as nothing was
    repeated."""

    value: float
    within: float | None

    @property
    def none(self) -> bool:
        """Whether seeds alone make such a difference. Two equal means differ in nothing, whatever is known of the
        spread."""
        return self.value == 0 or (self.within is not None and abs(self.value) <= self.within)


def difference(one: Spread, best: Spread, everyone: Iterable[Spread]) -> Difference:
    """``one`` against ``best``, held against the pooled spread of these two, or, where neither was repeated, of
    ``everyone``."""
    within = pooled((one, best))
    return Difference(one.mean - best.mean, pooled(everyone) if within is None else within)
