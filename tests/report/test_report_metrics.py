"""Means over seeds and pooled spreads, against numpy; how numbers are scaled."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hybridlm.report.metrics import Spread, difference, pooled_std, scale, spread


def test_mean_and_deviation():
    values = [1.5, 2.25, 1.75, 3.0]
    found = spread(values)
    assert (found.mean, found.n) == (pytest.approx(np.mean(values)), 4)
    assert found.std == pytest.approx(np.std(values, ddof=1))
    assert spread([2.0]) == Spread(2.0, None, 1)
    assert spread([]) is None


def test_values_that_are_not_finite_are_left_out():
    assert spread([math.nan, 2.0, math.inf]) == Spread(2.0, None, 1)
    assert spread([math.nan]) is None


def test_pooled_over_groups_of_unequal_size():
    groups = [[1.0, 1.4, 1.1], [3.0, 3.5], [9.0], [5.0, 5.1, 5.2, 4.9, 5.4]]
    n, squares = sum(map(len, groups)), sum(((np.array(group) - np.mean(group)) ** 2).sum() for group in groups)
    assert pooled_std(map(spread, groups)) == pytest.approx(math.sqrt(squares / (n - len(groups))))


def test_pooled_of_two_equal_groups_is_the_root_of_the_mean_variance():
    one, other = np.random.default_rng(0).normal(size=(2, 5))
    assert pooled_std([spread(one), spread(other)]) == pytest.approx(np.sqrt((one.var(ddof=1) + other.var(ddof=1)) / 2))


def test_without_repetition_the_spread_is_unknown():
    assert pooled_std([spread([1.0]), spread([2.0])]) is None
    apart = difference(spread([1.2]), spread([1.0]), [spread([1.2]), spread([1.0])])
    assert (apart.value, apart.std, apart.within_noise) == (pytest.approx(0.2), None, False)


@pytest.mark.parametrize(("shift", "none"), [(0.09, True), (0.11, False), (-0.09, True), (-0.11, False)])
def test_a_difference_within_the_pooled_spread_is_noise(shift, none):
    best = Spread(2.0, 0.1, 3)
    apart = difference(Spread(2.0 + shift, 0.1, 3), best, [best])
    assert (apart.std, apart.within_noise) == (pytest.approx(0.1), none)


def test_two_single_runs_use_the_spread_of_the_others():
    best, other, repeated = Spread(1.0, None, 1), Spread(1.2, None, 1), Spread(2.0, 0.3, 4)
    assert difference(other, best, [best, other, repeated]).std == pytest.approx(0.3)
    assert difference(repeated, best, [best, other, repeated]).std == pytest.approx(0.3)


def test_a_noisy_configuration_does_not_hide_the_difference_of_two_others():
    best, other, wild = Spread(1.0, 0.01, 3), Spread(1.1, 0.01, 3), Spread(2.0, 5.0, 3)
    assert not difference(other, best, [best, other, wild]).within_noise
    assert difference(wild, best, [best, other, wild]).within_noise


def test_equal_means_do_not_differ_whatever_the_spread():
    same = Spread(1.0, None, 1)
    assert difference(same, same, [same]).within_noise


@pytest.mark.parametrize(
    ("values", "unit", "written"),
    [
        ([1536.0, 1048576.0], "bytes", (["1.50", "1,024.00"], "KiB")),
        ([512.0], "bytes", (["512"], "B")),
        ([1.15e6, 3e9], "FLOP", (["1.15", "3,000.00"], "MFLOP")),
        ([195_352.0], "count", (["195"], "thousand")),
        ([0.0123, 12.5], "GiB", (["0.0123", "12.5000"], "GiB")),
        ([90.0, 7200.0], "seconds", (["1.50", "120.00"], "min")),
        ([0.0, 0.0], "seconds", (["0", "0"], "s")),
        ([0.25, 12.0], "seconds", (["0.250", "12.000"], "s")),
        ([math.nan, 5.5], "tokens/s", (["nan", "5.50"], "tokens/s")),
    ],
)
def test_scale(values, unit, written):
    found = scale(values, unit)
    assert ([found.text(value) for value in values], found.unit) == written
