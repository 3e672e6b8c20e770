"""Means over seeds and pooled spreads, against numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hybridlm.report.spread import Spread, difference, pooled, spread


def test_mean_and_deviation():
    values = [1.5, 2.25, 1.75, 3.0]
    found = spread(values)
    assert (found.mean, found.n) == (pytest.approx(np.mean(values)), 4)
    assert found.deviation == pytest.approx(np.std(values, ddof=1))
    assert spread([2.0]) == Spread(2.0, None, 1)
    assert spread([]) is None


def test_what_is_not_a_number_is_left_out():
    assert spread([math.nan, 2.0, math.inf]) == Spread(2.0, None, 1)
    assert spread([math.nan]) is None


def test_pooled_over_groups_of_unequal_size():
    groups = [[1.0, 1.4, 1.1], [3.0, 3.5], [9.0], [5.0, 5.1, 5.2, 4.9, 5.4]]
    squares = sum(((np.array(group) - np.mean(group)) ** 2).sum() for group in groups)
    assert pooled(map(spread, groups)) == pytest.approx(math.sqrt(squares / sum(len(group) - 1 for group in groups)))


def test_pooled_of_two_equal_groups_is_the_root_of_the_mean_variance():
    one, other = np.random.default_rng(0).normal(size=(2, 5))
    assert pooled([spread(one), spread(other)]) == pytest.approx(np.sqrt((one.var(ddof=1) + other.var(ddof=1)) / 2))


def test_nothing_repeated_no_spread():
    assert pooled([spread([1.0]), spread([2.0])]) is None
    apart = difference(spread([1.2]), spread([1.0]), [spread([1.2]), spread([1.0])])
    assert (apart.value, apart.within, apart.none) == (pytest.approx(0.2), None, False)


@pytest.mark.parametrize(("shift", "none"), [(0.09, True), (0.11, False), (-0.09, True), (-0.11, False)])
def test_a_difference_within_the_pooled_spread_is_none(shift, none):
    best = Spread(2.0, 0.1, 3)
    apart = difference(Spread(2.0 + shift, 0.1, 3), best, [best])
    assert (apart.within, apart.none) == (pytest.approx(0.1), none)


def test_of_two_points_that_were_not_repeated_the_others_tell_the_spread():
    best, other, repeated = Spread(1.0, None, 1), Spread(1.2, None, 1), Spread(2.0, 0.3, 4)
    assert difference(other, best, [best, other, repeated]).within == pytest.approx(0.3)
    assert difference(repeated, best, [best, other, repeated]).within == pytest.approx(0.3)


def test_a_point_that_scatters_does_not_hide_the_difference_of_two_others():
    best, other, wild = Spread(1.0, 0.01, 3), Spread(1.1, 0.01, 3), Spread(2.0, 5.0, 3)
    assert not difference(other, best, [best, other, wild]).none
    assert difference(wild, best, [best, other, wild]).none


def test_equal_means_do_not_differ_whatever_the_spread():
    same = Spread(1.0, None, 1)
    assert difference(same, same, [same]).none
