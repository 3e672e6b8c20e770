"""How a run ends before its last step: by a signal, by the time limit; under SLURM; and that it goes on from there
exactly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import lightning
import pytest
from forks import forked
from run_ends import assert_same_end, lives, rows, second_rank

from hybridlm.cli.compose import compose_config
from hybridlm.cli.start import main
from hybridlm.config.duration import seconds_of
from hybridlm.errors import UserError
from hybridlm.machine.launcher import INTERRUPTED, SIGNALLED
from hybridlm.machine.signals import heeded, listening, requeue
from hybridlm.runs.run_folder import RunFolder
from hybridlm.train import run as run_module
from hybridlm.train.run import run
from hybridlm.train.stopping import Stopped

TRAIN = Path(__file__).parents[2] / "train.py"


class At(lightning.Callback):
    """Does something at the beginning of a micro-batch."""

    def __init__(self, micro_batch: int, do) -> None:
        self._left, self._do = micro_batch, do

    def on_train_batch_start(self, *_: object) -> None:
        if self._left == 0:
            self._do()
        self._left -= 1


@pytest.fixture
def during(monkeypatch):
    """``during(n, do)``: the next runs call ``do`` when micro-batch ``n`` of each begins."""
    make = run_module.make_trainer

    def plan(micro_batch: int, do) -> None:
        def made(config, machine, folder, loggers, callbacks, *more):
            return make(config, machine, folder, loggers, [At(micro_batch, do), *callbacks], *more)

        monkeypatch.setattr(run_module, "make_trainer", made)

    yield plan
    for number in (signal.SIGTERM, signal.SIGUSR1):
        assert signal.getsignal(number) is signal.SIG_DFL


def kill(number: signal.Signals):
    return lambda: os.kill(os.getpid(), number)


# Micro-batch 5 is within the accumulation window of step 3, behind which no validation is due; 7 in that of step 4,
# which has one.
@pytest.mark.parametrize(
    ("number", "micro_batch", "step", "code"),
    [(signal.SIGTERM, 5, 3, SIGNALLED), (signal.SIGUSR1, 7, 4, SIGNALLED), (signal.SIGINT, 5, 3, INTERRUPTED)],
)
def test_a_signal_stops_at_the_end_of_the_step_and_a_resume_is_exact(
    tiny, tmp_path, during, capsys, number, micro_batch, step, code
):
    config = compose_config([*tiny, "trainer.accumulate=2", "trainer.log_every=1", "trainer.ckpt_every=100"])
    whole, broken = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "broken")
    run(config, whole, None)
    during(micro_batch, kill(number))
    with pytest.raises(Stopped) as stopped:
        run(config, broken, None)
    assert stopped.value.code == code
    (line,) = (
        line for line in capsys.readouterr().out.splitlines() if f"stopped by {number.name} at step {step}" in line
    )
    assert " python train.py ckpt=" in line
    assert [row["step"] for row in rows(broken)] == list(range(1, step + 1))
    assert (rows(broken)[-1]["val/bpb"] is None) == (step != 4)
    assert not broken.summary.exists()
    assert not broken.samples.exists()
    assert not broken.weights.exists()
    during(10**6, None)
    run(config, broken, broken.step_checkpoint(step))
    assert_same_end(broken, whole)


def test_the_time_limit_stops_at_a_step_with_exit_code_0(tiny, tmp_path, during, capsys):
    config = compose_config([*tiny, "trainer.time_limit=1h"])
    whole, broken = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "broken")
    run(config, whole, None)
    clock = time.perf_counter
    late = [0.0]
    during(4, lambda: late.__setitem__(0, 3600.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hybridlm.train.stopping.time.perf_counter", lambda: clock() + late[0])
        assert run(config, broken, None) == {}
    assert "stopped by trainer.time_limit at step 5;" in capsys.readouterr().out
    assert not broken.summary.exists()
    during(10**6, None)
    run(config, broken, broken.newest_checkpoint())
    assert_same_end(broken, whole)


def test_the_time_limit_does_not_cut_off_the_end(tiny, tmp_path, during):
    folder = RunFolder(tmp_path / "a")
    late = [0.0]
    clock = time.perf_counter
    during(11, lambda: late.__setitem__(0, 3600.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hybridlm.train.stopping.time.perf_counter", lambda: clock() + late[0])
        run(compose_config([*tiny, "trainer.time_limit=1h"]), folder, None)
    assert folder.summary.exists()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1:30:00", 5400), ("00:00:05", 5), ("90m", 5400), ("2h", 7200), ("45s", 45), ("100:00:00", 360_000)],
)
def test_durations(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["90", "1:30", "1:60:00", "0s", "-5m", "soon", "5400", "1.5h"])
def test_an_invalid_duration_is_refused_in_one_line(tiny, text):
    with pytest.raises(UserError, match=r"trainer\.time_limit = .*90m") as caught:
        compose_config([*tiny, f"trainer.time_limit={text}"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("environment", "script", "called", "says"),
    [
        ({"SLURM_JOB_ID": "77"}, "exit 0", "requeue 77", "job 77 is requeued"),
        (
            {"SLURM_JOB_ID": "78", "SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "3"},
            "exit 0",
            "requeue 77_3",
            "job 77_3 is requeued",
        ),
        ({"SLURM_JOB_ID": "77"}, "echo not allowed >&2; exit 1", "requeue 77", "scontrol requeue 77: not allowed"),
        ({}, "exit 0", None, "SLURM_JOB_ID is not set"),
    ],
)
def test_requeue(tmp_path, monkeypatch, environment, script, called, says):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\n{script}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    said: list[str] = []
    requeue(said.append)
    assert says in said[0]
    written = tmp_path / "called"
    assert (written.read_text().strip() if written.exists() else None) == called


@pytest.fixture
def queued(tmp_path, monkeypatch):
    """In a job of SLURM whose scontrol only takes notes: they are what this returns."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/called\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    return lambda: (tmp_path / "called").read_text().splitlines() if (tmp_path / "called").exists() else []


@pytest.mark.parametrize(
    ("settings", "number", "calls"),
    [
        (["trainer.requeue=true"], signal.SIGUSR1, ["requeue 77"]),
        ([], signal.SIGUSR1, []),
        (["trainer.requeue=true"], signal.SIGTERM, []),  # cancelled, or preempted, which SLURM queues again by itself
    ],
)
def test_a_job_is_requeued_after_sigusr1_if_asked_for(tiny, tmp_path, queued, during, settings, number, calls):
    during(1, kill(number))
    with pytest.raises(Stopped):
        run(compose_config([*tiny, *settings]), RunFolder(tmp_path / "a"), None)
    assert queued() == calls


def test_signals_within_a_second_count_as_one(tiny, tmp_path, queued, during):
    """As SLURM sends them when it preempts a job, and torchrun when someone presses Ctrl-C; under SLURM a later SIGTERM
    is one more."""

    def several() -> None:
        for number in (signal.SIGTERM, signal.SIGCONT, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        time.sleep(1.1)
        os.kill(os.getpid(), signal.SIGTERM)

    during(1, several)
    with pytest.raises(Stopped) as stopped:
        run(compose_config([*tiny, "trainer.requeue=true"]), RunFolder(tmp_path / "a"), None)
    assert (stopped.value.reason, stopped.value.code) == ("SIGTERM", SIGNALLED)
    assert RunFolder(tmp_path / "a").step_checkpoint(2).exists()
    assert queued() == []


def test_another_handler_of_a_signal_is_called_once_the_run_is_saved(tiny, tmp_path, during, capsys):
    """submitit queues its job again and ends the process."""
    folder, seen = RunFolder(tmp_path / "a"), []

    def requeues(number: int, frame: object) -> None:
        seen.append((number, folder.step_checkpoint(2).exists()))
        raise SystemExit(-1)

    before = signal.signal(signal.SIGUSR2, requeues)
    try:
        during(1, kill(signal.SIGUSR2))
        with pytest.raises(SystemExit) as ended:
            run(compose_config(tiny), folder, None)
        assert signal.getsignal(signal.SIGUSR2) is requeues
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert (seen, ended.value.code) == ([(signal.SIGUSR2, True)], -1)
    assert "at step 2;" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("again", "first", "calls"), [(True, True, ["requeue 77"]), (True, False, []), (False, True, [])]
)
@pytest.mark.parametrize("early", [True, False], ids=["before_the_configuration_is_read", "before_training"])
def test_sigusr1_before_training_ends_the_run(queued, monkeypatch, capsys, again, first, calls, early):
    waited: list[float] = []
    monkeypatch.setattr("hybridlm.machine.signals.time.sleep", waited.append)

    def take() -> None:
        with listening():
            if early:
                kill(signal.SIGUSR1)()
            with heeded(again, first):
                kill(signal.SIGUSR1)()
                pytest.fail("continues")

    with pytest.raises(SystemExit) as ended:
        take()
    assert ended.value.code == SIGNALLED
    assert queued() == calls
    assert bool(waited) != first  # for the first one, which asks
    assert "stopped by SIGUSR1, with nothing to save" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def started(arguments: list[str], folder: Path, environment: dict[str, str]) -> subprocess.Popen:
    """A run as a process of its own, once it has logged a step."""
    log = (folder / "log").open("ab")
    command = [sys.executable, str(TRAIN), *arguments]
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    wait_for_a_step(folder, lambda: process.poll() is None)
    return process


def wait_for_a_step(folder: Path, alive: Callable[[], bool]) -> None:
    """Until a run somewhere in the folder has logged two steps."""
    deadline = time.monotonic() + 300
    while not any(
        json.loads(line)["step"] >= 2 for path in folder.glob("**/metrics.jsonl") for line in whole_lines(path)
    ):
        assert alive(), (folder / "log").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def whole_lines(path: Path) -> list[str]:
    return path.read_text().split("\n")[:-1]


def ended(process: subprocess.Popen) -> int:
    try:
        return process.wait(timeout=300)
    finally:
        process.kill()


LONG = ["trainer.max_steps=1000000", "trainer.val_every=null", "trainer.ckpt_every=1000000"]


def test_a_sweep_ends_with_the_job_that_was_stopped(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "log").open("wb") as log:
        process = forked(main, [*tiny, *LONG, "-m", "seed=1,2"], output=log.fileno())
    wait_for_a_step(tmp_path, process.is_alive)
    os.kill(process.pid, signal.SIGTERM)
    process.join(300)
    assert process.exitcode == SIGNALLED, (tmp_path / "log").read_text()[-3000:]
    (folder,) = {path.parent for path in tmp_path.glob("multirun/**/metrics.jsonl")}
    assert len(RunFolder(folder).step_checkpoints()) == 1
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all(tiny, tmp_path, environment):
    """Also one that reaches only the second: no rank is left behind, and the two go on exactly."""
    base = [
        *tiny,
        "trainer.devices=2",
        "trainer.accumulate=2",
        "trainer.log_every=1",
        "optim=adamw",
        "optim.schedule=constant",
    ]
    base += ["optim.warmup=0", "trainer.val_every=null", "trainer.ckpt_every=1000000"]
    process = started([*base, "trainer.max_steps=1000000", "hydra.run.dir=a"], tmp_path, environment)
    second = second_rank(process.pid)
    os.kill(second, signal.SIGUSR1)
    assert ended(process) == SIGNALLED, (tmp_path / "log").read_text()[-3000:]
    deadline = time.monotonic() + 60
    while lives(second):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    folder, whole = RunFolder(tmp_path / "a"), RunFolder(tmp_path / "b")
    end = rows(folder)[-1]["step"] + 3
    for arguments in (["ckpt=last", "hydra.run.dir=a"], [*base, "hydra.run.dir=b"]):
        command = [sys.executable, str(TRAIN), *arguments, f"trainer.max_steps={end}"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    assert_same_end(folder, whole, end)
