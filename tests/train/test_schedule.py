"""The learning rate as a function of the step."""

from itertools import pairwise

import pytest

from hybridlm.config.train import OptimConfig
from hybridlm.train.schedule import lr_factor, warmup_steps


def factors(steps=100, **fields):
    config = OptimConfig(**fields)
    return [lr_factor(step, config, steps) for step in range(steps)]


def test_warmup_is_linear_and_reaches_the_peak():
    values = factors(warmup=10, schedule="constant")
    assert values[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert values[10:] == [1.0] * 90


def test_a_share_and_a_count_of_warmup_steps_are_the_same():
    assert factors(warmup=0.2) == factors(warmup=20)
    assert warmup_steps(OptimConfig(warmup=0), 100) == 0


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_decay_is_monotone_and_ends_at_the_final_rate(schedule):
    values = factors(warmup=10, schedule=schedule, final_lr=0.1)
    after = values[10:]
    assert after[0] == pytest.approx(1.0)
    assert all(a > b for a, b in pairwise(after))
    assert lr_factor(100, OptimConfig(warmup=10, schedule=schedule, final_lr=0.1), 100) == pytest.approx(0.1)


def test_half_way_values():
    assert lr_factor(50, OptimConfig(warmup=0, schedule="linear"), 100) == pytest.approx(0.5)
    assert lr_factor(25, OptimConfig(warmup=0, schedule="cosine"), 100) == pytest.approx(0.853553, abs=1e-6)
