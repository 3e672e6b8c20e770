"""How long a sweep takes, before it begins and while it runs."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from hybridlm.cli.compose import compose_config, sweep_axes
from hybridlm.memory.plan import plan_run
from hybridlm.sweep.estimate import Work, planned_seconds, plans_of, seconds_left, work_of
from hybridlm.sweep.job import Job
from hybridlm.sweep.plan import plan
from hybridlm.sweep.show import Show


def job(number, status="waiting", seconds=0.0):
    return Job(number, f"j{number}", (), {}, 0, status=status, seconds=seconds)


def test_jobs_that_differ_in_seed_and_rates_share_a_plan(monkeypatch):
    asked = []
    monkeypatch.setattr("hybridlm.sweep.estimate.plan_run", lambda config: asked.append(config) or plan_run(config))
    given = ["size=tiny", "hardware=rtx3070", "model.pattern=T,TM", "optim.lr=1e-3,2e-3", "trainer.max_steps=100"]
    planned = plan(sweep_axes(given), 2, compose_config, gpu=True, group="s")
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
    assert work_of(plans)[3] == Work(100, other)


def test_what_is_left_follows_from_what_is_done():
    work = {number: Work(100, units) for number, units in ((1, 10.0), (2, 20.0), (3, 10.0), (4, 40.0))}
    jobs = [job(1, "finished", 5.0), job(2, "running"), job(3), job(4)]
    # 10 + half of 20 units took 5 + 5 seconds: half a second for each of the 10 + 10 + 40 that are left.
    assert seconds_left(jobs, {2: (5.0, 50)}, work, 1) == pytest.approx(30)
    assert seconds_left(jobs, {2: (5.0, 50)}, work, 2) == pytest.approx(20), (
        "the longest job, which no second slot shortens"
    )
    resumed = [job(1, "finished", 5.0), job(2, "running", 2.0), job(3), job(4)]
    assert seconds_left(resumed, {2: (3.0, 50)}, work, 1) == pytest.approx(30), "earlier attempts count"
    assert seconds_left(jobs, {2: (5.0, 0)}, {2: work[2], 3: work[3]}, 1) is None, "nothing is done of what is known"
    ended = [job(1, "finished", 5.0), job(2, "failed", 3.0), job(3, "finished", 5.0), job(4, "stopped", 1.0)]
    assert seconds_left(ended, {}, work, 1) == 0


def test_the_time_that_is_left_is_shown(tmp_path, capsys):
    work = {1: Work(100, 1.0), 2: Work(100, 1.0)}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 50, "train/loss": 2.0}) + "\n")
    show = Show(2, work, 1)
    show.ended(job(1, "finished", 60.0), tmp_path, [job(1, "finished", 60.0), job(2)], {})
    assert capsys.readouterr().out.splitlines()[0].endswith("about 1:00 left")
    show.ended(job(1, "finished", 60.0), tmp_path, [job(1, "finished", 60.0), job(2, "running")], {2: (30.0, tmp_path)})
    assert capsys.readouterr().out.splitlines()[0].endswith("about 0:30 left")
    show.ended(job(2, "finished", 60.0), tmp_path, [job(1, "finished", 60.0), job(2, "finished", 60.0)], {})
    assert "left" not in capsys.readouterr().out
    console = Console(file=(screen := io.StringIO()), force_terminal=True, width=100, color_system=None)
    show = Show(2, work, 1, console)
    with show:
        show.tick([job(1, "finished", 60.0), job(2, "running")], {2: (30.0, tmp_path)})
    assert "1 running, 1 finished, about 0:30 left" in screen.getvalue()
