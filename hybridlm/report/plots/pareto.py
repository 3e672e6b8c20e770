"""The points that no other one beats in both of two respects."""

from __future__ import annotations

from collections.abc import Sequence


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (x, y) that no other dominates, by rising x. Less is better in both; turn the sign where
    more is.

    A point dominates another that it equals or beats in both respects and beats in one; of equal points each is in.
    """
    kept: list[int] = []
    best = float("inf")
    least_x = float("nan")
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        x, y = points[index]
        if y < best or (y == best and x == least_x):
            kept.append(index)
            best, least_x = y, x
    return kept
