"""``hybridlm sweep`` as a user meets it, and a sweep of real runs that is killed in the middle."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from hybridlm.cli.compose import compose_config, sweep_axes
from hybridlm.cli.verbs import app
from hybridlm.errors import UserError
from hybridlm.memory.plan import plan_run
from hybridlm.runs.run_folder import JOB, SWEEP, RunFolder, step_of
from hybridlm.sweep.command import planned_seconds, plans_of, slots_of
from hybridlm.sweep.expand import PlannedJob, expand
from hybridlm.sweep.job import Job, find
from hybridlm.sweep.runner import is_training

COMMAND = [sys.executable, "-m", "hybridlm", "sweep"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["model.pattern=TX,T", "size=tiny"], "'X'"),
        (
            ["-m", "seed=1,2"],
            "unknown option -m; legal: --jobs, --seeds, --resume, --dry-run, --help and the overrides of train.py",
        ),
        (["--resume", "nowhere"], "--resume nowhere: no sweep of"),
        (["--resume", "nowhere", "seed=1"], "accepts only --jobs"),
        (["a=("], "'a=('"),
        (["size=tiny", "optim.warmup=2000", "optim.lr=1e-3,2e-3"], "not below trainer.max_steps = 300 (auto, on CPU)"),
        (["hardware.memory_gb=1", "hardware=cpu", "size=d12"], "hybrid_small: this run needs "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_code_2_and_leaves_nothing(tmp_path, monkeypatch, arguments, part):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["sweep", *arguments])
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1), result
    assert part in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_lists_jobs_with_their_match(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [
        "model=hybrid_alternating",
        "size=tiny",
        "model.pattern=T,MMT",
        "sweep.match=params",
        "--seeds",
        "2",
        "--dry-run",
    ]
    result = CliRunner().invoke(app, ["sweep", *given])
    assert result.exit_code == 0, result
    lines = result.stdout.splitlines()
    assert [line.split()[1] for line in lines[:4]] == ["T-s0", "MMT-s0", "T-s1", "MMT-s1"]
    assert "pattern T" in lines[1]
    assert all("parameters" in line and "GiB" in line for line in lines[:4])
    assert all(re.search(r"GiB  [\d.]+ (seconds|minutes)", line) for line in lines[:4])
    assert re.match(r"4 jobs, 1 in parallel, about [\d.]+ (seconds|minutes) ", lines[4])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / SWEEP).write_text("{}")
    result = CliRunner().invoke(app, ["sweep", "hydra.sweep.dir=old", "--dry-run"])
    assert (result.exit_code, result.stdout) == (2, ""), "as without --dry-run"
    assert "old already holds a sweep" in result.stderr


def test_slots_share_gpus_and_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def slots(gpus, jobs, *overrides):
        job = Job(number=1, name="a", overrides=(), point={}, seed=0)
        return slots_of([PlannedJob(job, compose_config(overrides))] * 3, gpus, jobs)

    assert slots([], None) == [{"OMP_NUM_THREADS": "8"}]
    assert slots([], 3) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert slots([], 8) == slots([], 3), "no slot without a job"
    two = [{"OMP_NUM_THREADS": "4", "CUDA_VISIBLE_DEVICES": name} for name in ("3", "5")]
    assert slots(["3", "5"], None) == two
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots(["3", "5"], 3)] == ["3", "5", "3"]
    assert slots(["3", "5"], None, "hardware=cpu") == [{"OMP_NUM_THREADS": "8"}]
    pairs = slots(list("01234"), None, "trainer.devices=2", "data.global_batch=auto")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in pairs] == ["0,1", "2,3"]
    with pytest.raises(UserError, match=r"trainer\.devices = 4: this machine has 2"):
        slots(["3", "5"], None, "trainer.devices=4")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert slots([], 2) == [{"OMP_NUM_THREADS": "1"}] * 2


def test_jobs_that_differ_in_seed_and_rates_share_a_plan(monkeypatch):
    asked = []
    monkeypatch.setattr("hybridlm.sweep.command.plan_run", lambda config: asked.append(config) or plan_run(config))
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


@pytest.mark.slow
def test_twelve_jobs_killed_in_the_middle_one_failing(tiny, tmp_path, environment, corpus):
    """The runner and everything it started are killed; resumed, eleven jobs finish, one fails, and no finished one ran
    twice."""
    base = [line for line in tiny if not line.startswith(("data.path=", "model.pattern=", "model.n_layers="))]
    grid = [
        "model.n_layers=2",
        "model.pattern=T,MT",
        "optim.lr=1e-3,3e-3,1e-2",
        "--seeds",
        "2",
        "hydra.sweep.dir=s",
        "--jobs",
        "2",
    ]
    command = [*COMMAND, *base, f"data.path={corpus}/*.txt", *grid, "trainer.max_steps=200", "trainer.val_every=100"]
    log = (tmp_path / "log").open("w+")
    runner = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True)
    folder = tmp_path / "s"

    def statuses():
        return [job.status for job in find(str(folder)).read()] if (folder / "sweep.json").exists() else []

    def in_the_middle():
        """Some are finished, and one that runs has saved and is far from its end."""
        going = [name for name, status in zip(find(str(folder)).jobs, statuses(), strict=True) if status == "running"]
        saved = [step_of(path) for name in going for path in RunFolder(folder / name).step_checkpoints()[:1]]
        return statuses().count("finished") >= 2 and any(step < 120 for step in saved)

    while not statuses() or not in_the_middle():
        assert runner.poll() is None, (tmp_path / "log").read_text()[-3000:]
        time.sleep(0.05)
    os.killpg(runner.pid, signal.SIGKILL)
    runner.wait()
    jobs = find(str(folder)).jobs
    while any(is_training(folder / name) for name in jobs):
        time.sleep(0.1)
    before = {
        name: (folder / name / "summary.json").stat().st_mtime_ns
        for name in jobs
        if (folder / name / "summary.json").exists()
    }
    unstarted = next(name for name in reversed(jobs) if json.loads((folder / name / JOB).read_text())["attempts"] == 0)
    job = json.loads((folder / unstarted / JOB).read_text())
    job["overrides"] = [line if "data.path" not in line else "++data.path=gone/*.txt" for line in job["overrides"]]
    (folder / unstarted / JOB).write_text(json.dumps(job))

    again = [*COMMAND, "--resume", "s", "--jobs", "2"]
    result = subprocess.run(again, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 1, result.stdout[-3000:] + result.stderr[-3000:]
    found = {name: json.loads((folder / name / JOB).read_text()) for name in jobs}
    assert sorted(entry["status"] for entry in found.values()) == ["failed"] + ["finished"] * 11
    assert "gone/*.txt" in found[unstarted]["error"]
    assert any(line.startswith("failed") and "gone/*.txt" in line for line in result.stdout.splitlines())
    for name in jobs:
        if name != unstarted:
            steps = [json.loads(row)["step"] for row in RunFolder(folder / name).metrics_jsonl.read_text().splitlines()]
            assert steps == sorted(set(steps))
            assert json.loads(RunFolder(folder / name).summary.read_text())["steps"] == 200
    assert {name: (folder / name / "summary.json").stat().st_mtime_ns for name in before} == before, (
        "finished jobs were left alone"
    )
    resumed = [name for name in jobs if "resuming after step" in (folder / name / "job.log").read_text()]
    assert resumed, "a job that was killed went on from its checkpoint"
    assert all(found[name]["attempts"] == (2 if name in resumed else found[name]["attempts"]) for name in jobs)
