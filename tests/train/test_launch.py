"""The processes of a run of several devices: they meet, and whatever ends one of them ends all, with a line and without
one left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from run_ends import second_rank, session

from hybridlm.errors import UserError
from hybridlm.machine.launcher import Launch
from hybridlm.runs.run_folder import RunFolder
from hybridlm.train.launch import Ranks, this_job

TRAIN = Path(__file__).parents[2] / "train.py"
LONG = [
    "trainer.max_steps=1000000",
    "trainer.val_every=null",
    "trainer.ckpt_every=1000000",
    "trainer.log_every=1",
    "trainer.devices=2",
]
# Stands for train.py: one of the two processes does something else at its third step.
SCRIPT = """
import sys
from hybridlm.machine.launcher import is_child
from hybridlm.train.stopping import Stopping

before = Stopping.reason

def reason(self, trainer):
    if trainer.global_step == 3 and is_child() == {child}:
        {what}
    return before(self, trainer)

Stopping.reason = reason
from hybridlm.cli.start import main
main()
"""


def test_lightning_is_told_what_the_launcher_said():
    view = Ranks(Launch("srun", 2, 3, rank=5, local_rank=0, node_rank=1, address="n1", port=1234, id="7.0"))
    view.set_world_size(6)
    view.set_global_rank(2)
    assert (view.world_size(), view.global_rank(), view.local_rank(), view.node_rank()) == (6, 5, 0, 1)
    assert (view.main_address, view.main_port, view.creates_processes_externally, Ranks.detect()) == (
        "n1",
        1234,
        True,
        False,
    )


def test_a_port_that_is_taken_is_refused(tiny, tmp_path, environment):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        line = [sys.executable, str(TRAIN), *tiny, "trainer.devices=2", "hydra.run.dir=a"]
        done = subprocess.run(
            line, cwd=tmp_path, env={**environment, "MASTER_PORT": str(port)}, capture_output=True, text=True
        )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"error: port {port} is in use; set MASTER_PORT to a free one"


def test_only_a_run_of_the_command_line_can_be_started_again(monkeypatch):
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    with pytest.raises(
        UserError, match=r"trainer\.devices: several only in a run that train.py or hybridlm train has started"
    ):
        this_job(())


@pytest.fixture
def started(tiny, tmp_path, environment):
    """``started(program)``: a run of two processes once it has logged two steps; its log is in tmp_path/log."""
    processes = []

    def start(program: Path = TRAIN) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(program), *tiny, *LONG, "hydra.run.dir=a"]
        with (tmp_path / "log").open("ab") as log:
            process = subprocess.Popen(
                command, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        processes.append(process)
        rows, deadline = RunFolder(tmp_path / "a").metrics_jsonl, time.monotonic() + 120
        while process.poll() is None and not (rows.exists() and rows.read_text().count("\n") >= 2):
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.02)
        return process

    yield start
    for process in processes:
        for each in session(process.pid):
            os.kill(each, signal.SIGKILL)


def none_left(process: subprocess.Popen[bytes], seconds: float) -> int:
    """The exit code of the first process, once all have ended."""
    deadline = time.monotonic() + seconds
    while session(process.pid):
        assert time.monotonic() < deadline, f"left: {session(process.pid)}"
        process.poll()
        time.sleep(0.05)
    return process.wait(timeout=1)


@pytest.mark.slow
@pytest.mark.parametrize(("second", "code"), [(True, 1), (False, -signal.SIGKILL)])
def test_a_killed_process_ends_the_other(started, tmp_path, second, code):
    process = started()
    os.kill(second_rank(process.pid) if second else process.pid, signal.SIGKILL)
    assert none_left(process, 10) == code
    log = (tmp_path / "log").read_text()
    assert ("process 2 of 2" in log and "SIGKILL" in log) == second
    assert "Traceback" not in log


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "child", "says"),
    [
        ("raise ValueError('broken here')", True, "error: process 2 of 2 of this run exited with code 1"),
        ("raise ValueError('broken here')", False, "ValueError: broken here"),
        ("import os, time; os.kill(os.getppid(), 9); time.sleep(1000)", True, ""),
        (
            "import os, torch; torch.distributed.destroy_process_group(); os._exit(3)",
            True,
            "error: process 2 of 2 of this run exited with",
        ),
    ],
)
def test_a_failure_of_one_process_ends_the_other(started, tmp_path, what, child, says):
    script = tmp_path / "broken.py"
    script.write_text(SCRIPT.format(what=what, child=child))
    process = started(script)
    assert none_left(process, 15) in (1, -signal.SIGKILL)
    log = (tmp_path / "log").read_text()
    assert says in log
    assert log.count("Traceback") == ("raise" in what)


@pytest.mark.slow
@pytest.mark.parametrize("everyone", [True, False], ids=["terminal", "first_process"])
def test_ctrl_c_saves_on_both_and_once_more_ends_at_once(started, tmp_path, everyone):
    process = started()
    os.killpg(process.pid, signal.SIGINT) if everyone else process.send_signal(signal.SIGINT)
    assert none_left(process, 30) == 130
    log = (tmp_path / "log").read_text()
    (checkpoint,) = RunFolder(tmp_path / "a").step_checkpoints()
    assert f"stopped by SIGINT at step {int(checkpoint.stem.rpartition('-')[2])};" in log
    assert log.count("Ctrl-C: ") == 1
    assert "Traceback" not in log


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_run_within_a_step(started, tmp_path):
    script = tmp_path / "slow.py"
    script.write_text(SCRIPT.format(what="import time; time.sleep(60)", child=False))
    process = started(script)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(1.5)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    assert none_left(process, 5) == -signal.SIGINT
    assert not RunFolder(tmp_path / "a").step_checkpoints()
