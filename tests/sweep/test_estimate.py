"""How long a sweep takes, before it starts and while it runs."""

from __future__ import annotations

import pytest

from hybridlm.cli.compose import compose_config
from hybridlm.cli.composition import sweep_axes
from hybridlm.memory.plan import plan_run
from hybridlm.sweep.estimate import costs_of, planned_seconds, plans_of, seconds_left
from hybridlm.sweep.expand import expand
from hybridlm.sweep.job import Job


def job(number, status="waiting", seconds=0.0):
    return Job(number=number, name=f"j{number}", overrides=(), point={}, seed=0, status=status, seconds=seconds)


def test_jobs_that_differ_in_seed_and_rates_share_a_plan(monkeypatch):
    asked = []
    monkeypatch.setattr("hybridlm.sweep.estimate.plan_run", lambda config: asked.append(config) or plan_run(config))
    given = ["size=tiny", "hardware=rtx3070", "model.pattern=T,TM", "optim.lr=1e-3,2e-3", "trainer.max_steps=100"]
    planned = expand(sweep_axes(given), 2, compose_config, gpu=True, group="s")
    plans = plans_of(planned)
    assert (len(plans), len(asked)) == (8, 2)
    assert [plans[item.job.number].parameters for item in planned] == [
        plan_run(item.config).parameters for item in planned
    ]
    one, other = plans[1].seconds, plans[3].seconds
    assert (
        plans[1].seconds
        == plans[1].tokens / plans[1].tokens_per_s
        == 100 * plans[1].global_batch * 64 / plans[1].tokens_per_s
    )
    assert planned_seconds(plans, 1) == pytest.approx(4 * (one + other))
    assert planned_seconds(plans, 2) == pytest.approx(2 * (one + other))
    assert planned_seconds(plans, 100) == max(one, other), "a job is not split"
    assert costs_of(plans)[3] == other


def test_the_remaining_time_follows_from_finished_jobs():
    costs = {1: 10.0, 2: 20.0, 3: 10.0, 4: 40.0}
    jobs = [job(1, "finished", 5.0), job(2, "running"), job(3), job(4)]
    # Half a second per unit: 10 - 5, 5 and 20 seconds are left.
    assert seconds_left(jobs, {2: 5.0}, costs, 1) == pytest.approx(30)
    assert seconds_left(jobs, {2: 5.0}, costs, 2) == pytest.approx(20), "the longest job, which no second slot shortens"
    resumed = [job(1, "finished", 5.0), job(2, "running", 2.0), job(3), job(4)]
    assert seconds_left(resumed, {2: 3.0}, costs, 1) == pytest.approx(30), "earlier attempts count"
    assert seconds_left(jobs, {2: 5.0}, {2: costs[2], 3: costs[3]}, 1) is None, "nothing with a known cost is finished"
    ended = [job(1, "finished", 5.0), job(2, "failed", 3.0), job(3, "finished", 5.0), job(4, "stopped", 1.0)]
    assert seconds_left(ended, {}, costs, 1) == 0
