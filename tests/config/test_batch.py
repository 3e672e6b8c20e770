"""The one rule of a step's windows: micro-batch x accumulation x ranks."""

from __future__ import annotations

import itertools

import pytest

from hybridlm.config.batch import BatchSplit
from hybridlm.errors import ConfigError


@pytest.mark.parametrize(
    ("split", "fields"),
    [
        ((8, 4, None, 3), ["data.batch_size (4)", "trainer.devices (3)", "take a multiple of 12"]),
        ((8, 4, 2, 2), ["data.batch_size (4)", "trainer.accumulate (2)", "trainer.devices (2) = 16", "auto"]),
        ((8, None, 3, None), ["trainer.accumulate (3)"]),
    ],
)
def test_numbers_that_do_not_fit_together_are_named(split, fields):
    problem = BatchSplit(*split).problem
    assert [field for field in ["data.global_batch = 8", *fields] if field not in problem] == []


def test_ranks_of_a_launcher_count_too():
    """Their number may be a launcher's, which the configuration does not know."""
    split = BatchSplit(8, 4, None, None)
    assert split.problem is None
    assert split.windows_on(2, budget=16) == 8
    with pytest.raises(ConfigError, match=r"data\.global_batch = 8"):
        split.windows_on(3, budget=16)


def test_every_split_multiplies_out():
    numbers = (None, 1, 2, 3)
    for windows, micro, accumulate, ranks in itertools.product((None, 12, 16), numbers, numbers, (1, 2, 4)):
        split = BatchSplit(windows, micro, accumulate, None)
        if split._replace(ranks=ranks).problem is None:
            total = split.windows_on(ranks, budget=7)
            found = split.complete(total, ranks)
            assert found[0] * found[1] * ranks == total
            assert micro in (None, found[0])
            assert accumulate in (None, found[1])
            assert total == windows or (windows is None and (total >= 7 or None not in (micro, accumulate)))
