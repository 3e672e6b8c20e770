"""The search for a step's settings against trying them all, on a made-up memory and time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hybridlm.memory.search import FEW_ROWS, MemoryLimit, choose, possible_settings, roughly, smallest_step
from hybridlm.memory.timeline import Peak, StepSettings
from hybridlm.ops.cross_entropy import ROWS

FIXED = 1000


class Model:
    """Memory is linear in the micro-batch; checkpointing and few rows save memory and cost time."""

    outside = FIXED

    def __init__(self) -> None:
        self.asked: list[StepSettings] = []

    def bytes(self, step: StepSettings) -> int:
        every = step.checkpoint_blocks
        per_sequence = 100 - (60 // every if every else 0)
        return FIXED + per_sequence * step.batch_size + step.rows // 8 + (20 if step.accumulate > 1 else 0)

    def peak(self, step: StepSettings) -> Peak:
        self.asked.append(step)
        return Peak(self.bytes(step), {}, "")

    def at_least(self, step: StepSettings) -> int:
        return self.bytes(replace(step, accumulate=max(2, step.accumulate)))

    def time(self, step: StepSettings) -> float:
        again = 0.3 / step.checkpoint_blocks if step.checkpoint_blocks else 0.0
        return (1 + again) * (1 + 1 / step.batch_size) * (1.0 if step.rows == ROWS else 1.02)


OPTIONS = possible_settings(16, 12, "auto", "auto", "auto", "auto")


@pytest.mark.parametrize("limit", [*range(1050, 2800, 50), None])
def test_the_fastest_that_fits_is_chosen(limit):
    model, memory = Model(), MemoryLimit(limit, 0.0, 0)
    fitting = [step for step in OPTIONS if limit is None or model.bytes(step) <= limit]
    chosen, peak, fits = choose(model, OPTIONS, memory)
    assert fits == bool(fitting)
    assert peak.bytes == model.bytes(chosen)
    if fitting:
        assert model.time(chosen) == min(map(model.time, fitting))
    else:
        assert chosen == smallest_step(OPTIONS)
    assert len(model.asked) < len(OPTIONS) / 2, "most options are ruled out without a trace"


def test_a_rough_choice_fits_with_the_smallest_options_checkpointing():
    chosen, least = roughly(Model(), OPTIONS, MemoryLimit(1500, 0.0, 0))
    assert (chosen.checkpoint_blocks, chosen.rows) == (1, FEW_ROWS)
    assert least == Model().bytes(smallest_step(OPTIONS)) < Model().bytes(chosen) <= 1500
    assert roughly(Model(), OPTIONS, MemoryLimit(900, 0.0, 0)) is None


def test_fixed_settings_are_kept():
    assert {(step.batch_size, step.accumulate) for step in possible_settings(16, 12, 4, "auto", 0, 512)} == {(4, 4)}
    assert {(step.batch_size, step.accumulate) for step in possible_settings(16, 12, "auto", 2, 0, 512)} == {(8, 2)}
    assert {step.checkpoint_blocks for step in possible_settings(16, 3, 4, "auto", "auto", 512)} == {0, 1, 2, 3}


def test_the_allocator_reserves_more_than_the_peak():
    limit = MemoryLimit(1000, 0.25, 100)
    assert limit.reserved(400) == 600
    assert (limit.holds(720), limit.holds(721)) == (True, False)
