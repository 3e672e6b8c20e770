"""The front against a comparison of all pairs."""

from __future__ import annotations

import random

import pytest

from hybridlm.report.plots.pareto import front


def by_pairs(points):
    def beaten(one):
        return any(other[0] <= one[0] and other[1] <= one[1] and other != one for other in points)

    return {i for i, point in enumerate(points) if not beaten(point)}


@pytest.mark.parametrize("seed", range(50))
def test_against_all_pairs(seed):
    draw = random.Random(seed)
    highest = draw.choice([3, 8, 1000])  # few values: many ties, in one respect and in both
    points = [(draw.randint(0, highest), draw.randint(0, highest)) for _ in range(draw.randint(1, 40))]
    found = front(points)
    assert set(found) == by_pairs(points)
    assert len(found) == len(set(found))
    assert [points[i][0] for i in found] == sorted(points[i][0] for i in found)


def test_none():
    assert front([]) == []
