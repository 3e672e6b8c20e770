"""What a user sees of a running sweep."""

from __future__ import annotations

import io
import json

from rich.console import Console

from hybridlm.sweep.display import Display, last_row
from hybridlm.sweep.job import Job


def job(number, status="waiting", seconds=0.0):
    return Job(number=number, name=f"j{number}", overrides=(), point={}, seed=0, status=status, seconds=seconds)


def test_the_remaining_time_is_shown(tmp_path, capsys):
    costs = {1: 1.0, 2: 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 50, "train/loss": 2.0}) + "\n")
    display, first, running = Display(2, costs, 1), job(1, "finished", 60.0), {2: (30.0, tmp_path)}
    display.ended(first, tmp_path, [first, job(2)], {})
    assert capsys.readouterr().out.splitlines()[0].endswith("about 1:00 left")
    display.ended(first, tmp_path, [first, job(2, "running")], running)
    assert capsys.readouterr().out.splitlines()[0].endswith("about 0:30 left")
    display.ended(job(2, "finished", 60.0), tmp_path, [first, job(2, "finished", 60.0)], {})
    assert "left" not in capsys.readouterr().out
    console = Console(file=(screen := io.StringIO()), force_terminal=True, width=100, color_system=None)
    display = Display(2, costs, 1, console)
    with display.shown():
        display.update([first, job(2, "running")], running)
    assert "1 running, 1 finished, about 0:30 left" in screen.getvalue()


def test_the_newest_metrics_of_a_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert last_row(path) == {}
    path.write_text('{"step": 1, "train/loss": 2.0}\n{"step": 2, "val/bpb": 1.0}\n{"step": 3, "tra')
    assert last_row(path) == {"step": 2, "train/loss": 2.0, "val/bpb": 1.0}
