"""The runner with jobs that only pretend to train: a small program replaces ``hybridlm train``, and its overrides tell
it what to do."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from forks import forked

from hybridlm.cli.compose import compose_config
from hybridlm.errors import UserError
from hybridlm.runs.run_folder import JOB
from hybridlm.sweep import runner as runner_module
from hybridlm.sweep.command import resume_sweep
from hybridlm.sweep.job import Job, create, find
from hybridlm.sweep.runner import JobProcess, Runner, is_training

PROGRAM = """
import json, os, pathlib, signal, sys, time
from filelock import FileLock
given = dict(line.split("=", 1) for line in sys.argv[1:])
folder = pathlib.Path(given["hydra.run.dir"].strip("'"))
with open(folder / "calls", "a") as calls:
    calls.write(json.dumps([sys.argv[1:], os.environ.get("SLOT"), os.getpid()]) + "\\n")
recorded = folder / "recorded"
what = recorded.read_text() if "data.path" not in given else given["data.path"]
recorded.write_text(what)
(folder / "config.yaml").write_text("seed: 0")
def stop(number, frame):
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / "step-00000004.ckpt").write_text("")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
lock = FileLock(folder / "train.lock")
lock.acquire()
(folder / "ready").write_text("")
if what == "fail":
    print("something before")
    sys.exit("config error: model.d_model = 0: cannot be")
if what == "crash":
    raise ValueError("this is why")
if what == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if what.startswith("wait") and "ckpt" not in given:
    time.sleep(60)
if what != "limit":
    (folder / "summary.json").write_text(json.dumps({"val/bpb": 1.5}))
if what == "late":
    raise ValueError("a logger could not be closed")
"""


@pytest.fixture(autouse=True)
def program(tmp_path, monkeypatch):
    path = tmp_path / "pretend.py"
    path.write_text(PROGRAM)
    monkeypatch.setattr(runner_module, "_PROGRAM", (sys.executable, str(path)))
    return path


def sweep_of(folder, *what):
    jobs = [
        Job(number=i, name=f"j{word}", overrides=(f"data.path={word}",), point={"do": word}, seed=0)
        for i, word in enumerate(what, 1)
    ]
    return create(folder, jobs, ["data.path=..."], ["do"], "hybridlm sweep do=...")


def calls(folder):
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


def until(condition):
    """Waits for what has to happen, however slow the machine is."""
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("did not happen in a minute")


def test_every_way_a_job_can_end(tmp_path, capsys):
    sweep = sweep_of(tmp_path / "s", "done", "fail", "crash", "kill", "limit", "done")
    assert Runner(sweep, [{"SLOT": "a"}, {"SLOT": "b"}]).run() == 1
    found = [json.loads((sweep.folder / name / JOB).read_text()) for name in sweep.jobs]
    assert [job["status"] for job in found] == ["finished", "failed", "failed", "failed", "stopped", "finished"]
    errors = [
        None,
        "config error: model.d_model = 0: cannot be",
        "ValueError: this is why",
        "killed by SIGKILL",
        None,
        None,
    ]
    assert [job["error"] for job in found] == errors
    assert [job["exit_code"] for job in found] == [0, 1, 1, -signal.SIGKILL, 0, 0]
    assert all(job["attempts"] == 1 and job["started"] <= job["ended"] and job["seconds"] > 0 for job in found)
    assert {calls(sweep.job_folder(i))[0][1] for i in range(1, 7)} == {"a", "b"}
    said = capsys.readouterr().out.splitlines()
    assert next(line for line in said if line.startswith("failed")).endswith(
        "config error: model.d_model = 0: cannot be"
    )
    assert any("1.5000 bits per byte" in line for line in said)
    last = next(i for i, line in enumerate(said) if line.startswith("2 finished, 3 failed, 1 stopped of 6; "))
    assert [line.split()[0] for line in said[last + 1 : last + 4]] == ["2/6", "3/6", "4/6"]
    assert f"hybridlm sweep --resume {sweep.folder}" in said[last + 4]


def test_resume_leaves_finished_jobs_alone(tmp_path):
    sweep = sweep_of(tmp_path / "s", "done", "fail", "limit")
    Runner(sweep, [{}]).run()
    (sweep.job_folder(2) / "checkpoints").mkdir()
    (sweep.job_folder(2) / "checkpoints" / "step-00000004.ckpt").write_text("")
    assert Runner(find(str(tmp_path / "s")), [{}]).run() == 1
    assert [len(calls(sweep.job_folder(i))) for i in (1, 2, 3)] == [1, 2, 2]
    where = [f"hydra.run.dir='{sweep.job_folder(i)}'" for i in (1, 2, 3)]
    assert calls(sweep.job_folder(2))[1][0] == ["ckpt=auto", where[1]], (
        "it resumes from its checkpoint with its recorded settings"
    )
    assert calls(sweep.job_folder(3))[1][0] == ["data.path=limit", "ckpt=auto", where[2]], (
        "nothing was saved, so it starts over"
    )
    assert [job.attempts for job in sweep.read()] == [1, 2, 2]


def test_jobs_finished_by_another_runner_are_not_run_again(tmp_path):
    sweep = sweep_of(tmp_path / "s", "done")
    later = Runner(find(str(tmp_path / "s")), [{}])
    Runner(sweep, [{}]).run()
    assert later.run() == 0
    assert len(calls(sweep.job_folder(1))) == 1


def test_relative_paths_of_a_resumed_sweep_start_in_its_original_folder(tmp_path, monkeypatch):
    for name in ("here", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    sweep_of(Path("s"), "done")
    monkeypatch.chdir(tmp_path / "elsewhere")
    looked_from = []

    def compose(overrides):
        looked_from.append(Path.cwd())
        return compose_config([])

    assert resume_sweep("../here/s", jobs=None, compose=compose) == 0
    assert (looked_from, Path.cwd()) == ([tmp_path / "here"], tmp_path / "elsewhere")


def test_a_run_that_fails_after_its_summary_is_finished(tmp_path):
    sweep = sweep_of(tmp_path / "s", "late")
    assert Runner(sweep, [{}]).run() == 0
    (job,) = sweep.read()
    assert (job.status, job.exit_code, job.error) == ("finished", 1, None)


def run_in_child(sweep, slots=1):
    """A runner in a process and a session of its own; what it prints goes to the file ``said``."""

    def run():
        os.setsid()
        sys.exit(Runner(sweep, [{}] * slots).run())

    with open(sweep.folder / "said", "w") as said:
        return forked(run, output=said.fileno())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_jobs_save(tmp_path, number):
    sweep = sweep_of(tmp_path / "s", "wait", "wait", "done")
    runner = run_in_child(sweep, slots=2)
    until(lambda: all((sweep.job_folder(i) / "ready").exists() for i in (1, 2)))
    os.kill(runner.pid, number)
    runner.join()
    assert runner.exitcode == 143
    assert [job.status for job in sweep.read()] == ["stopped", "stopped", "waiting"]
    assert [job.exit_code for job in sweep.read()] == [143, 143, None]
    assert (sweep.folder / "said").read_text().splitlines()[-1].endswith(f"hybridlm sweep --resume {sweep.folder}")
    assert Runner(sweep, [{}]).run() == 0
    assert [len(calls(sweep.job_folder(i))) for i in (1, 2, 3)] == [2, 2, 1]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals children when their parent dies")
def test_jobs_end_with_a_killed_runner(tmp_path):
    sweep = sweep_of(tmp_path / "s", "wait", "done")
    runner = run_in_child(sweep)
    until(lambda: (sweep.job_folder(1) / "ready").exists())
    assert is_training(sweep.job_folder(1))
    with pytest.raises(UserError, match="another runner is working"):
        Runner(sweep, [{}]).run()
    os.killpg(runner.pid, signal.SIGKILL)
    runner.join()
    until(lambda: not is_training(sweep.job_folder(1)))
    assert sweep.read()[0].status == "running", "nobody was left to record it"
    assert Runner(sweep, [{}]).run() == 0
    assert [job.status for job in sweep.read()] == ["finished", "finished"]
    assert [len(calls(sweep.job_folder(i))) for i in (1, 2)] == [2, 1]
    assert calls(sweep.job_folder(1))[1][0][0] == "ckpt=auto"


def test_a_job_that_is_still_running_is_waited_for(tmp_path):
    """As after a runner's death where the system does not stop its jobs."""
    sweep = sweep_of(tmp_path / "s", "wait")
    job = sweep.read()[0].begun()
    sweep.write(job)
    folder = sweep.job_folder(1)
    alone = JobProcess(["data.path=wait", f"hydra.run.dir='{folder}'"], folder, os.environ, tmp_path)
    until(lambda: (folder / "ready").exists())
    (folder / "summary.json").write_text("{}")
    threading.Timer(1, alone.terminate).start()
    assert Runner(sweep, [{}]).run() == 0
    alone.poll()
    assert len(calls(folder)) == 1
    assert sweep.read()[0].status == "finished"
