"""What a user sees of a running sweep."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from hybridlm.sweep.display import Display, last_row, seconds_left
from hybridlm.sweep.job import Job


def job(number, status="waiting", seconds=0.0):
    return Job(number=number, name=f"j{number}", overrides=(), point={}, seed=0, status=status, seconds=seconds)


def test_the_remaining_time_is_shown(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 50, "train/loss": 2.0}) + "\n")
    display, first, running = Display(2, 1), job(1, "finished", 60.0), {2: (30.0, tmp_path)}
    display.ended(first, tmp_path, [first, job(2)], {})
    assert capsys.readouterr().out.splitlines()[0].endswith("about 1:00 left")
    display.ended(first, tmp_path, [first, job(2, "running")], running)
    assert capsys.readouterr().out.splitlines()[0].endswith("about 0:30 left")
    display.ended(job(2, "finished", 60.0), tmp_path, [first, job(2, "finished", 60.0)], {})
    assert "left" not in capsys.readouterr().out
    console = Console(file=(screen := io.StringIO()), force_terminal=True, width=100, color_system=None)
    display = Display(2, 1, console)
    with display.shown():
        display.update([first, job(2, "running")], running)
    assert "1 running, 1 finished, about 0:30 left" in screen.getvalue()


def test_the_newest_metrics_of_a_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert last_row(path) == {}
    path.write_text('{"step": 1, "train/loss": 2.0}\n{"step": 2, "val/bpb": 1.0}\n{"step": 3, "tra')
    assert last_row(path) == {"step": 2, "train/loss": 2.0, "val/bpb": 1.0}


def test_the_remaining_time_follows_from_finished_jobs():
    jobs = [job(1, "finished", 8.0), job(2, "finished", 12.0), job(3, "running"), job(4), job(5)]
    # Ten seconds each: 10 - 5, 10 and 10 are left.
    assert seconds_left(jobs, {3: 5.0}, 1) == pytest.approx(25)
    assert seconds_left(jobs, {3: 5.0}, 2) == pytest.approx(12.5)
    assert seconds_left(jobs, {3: 5.0}, 100) == pytest.approx(10), "a job is not split"
    resumed = [*jobs[:2], job(3, "running", 2.0), *jobs[3:]]
    assert seconds_left(resumed, {3: 3.0}, 1) == pytest.approx(25), "earlier attempts count"
    assert seconds_left(jobs[2:], {3: 5.0}, 1) is None, "nothing is finished"
    ended = [job(1, "finished", 5.0), job(2, "failed", 3.0), job(3, "finished", 5.0), job(4, "stopped", 1.0)]
    assert seconds_left(ended, {}, 1) == 0
