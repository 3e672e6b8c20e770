"""Two processes of one run: they begin anew together after a kill before the first checkpoint, and end together where
one is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_ends import lives

from hybridlm.runs.run_folder import RunFolder

pytestmark = pytest.mark.slow
TRAIN = Path(__file__).parents[2] / "train.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(TRAIN)]
ONE = [sys.executable, str(TRAIN), "trainer.devices=2"]
QUIET = ["callbacks=none", "trainer.val_every=null", "trainer.log_every=1"]


def arguments(tiny, folder):
    return [*(line for line in tiny if "samples" not in line), *QUIET, f"hydra.run.dir={folder}"]


def steps(folder):
    return [json.loads(line)["step"] for line in RunFolder(folder).metrics_jsonl.read_text().splitlines()]


def family(process):
    """It and all that it has started."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [process, *(one for child in children for one in family(int(child)))]


def wait_for_steps(process, folder):
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").is_file() or len(steps(folder)) < 5:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("program", [ONE, TORCHRUN], ids=["devices", "torchrun"])
def test_a_run_killed_before_its_first_checkpoint_starts_over(program, tiny, tmp_path, environment):
    folder = tmp_path / "run"
    line = [*program, *arguments(tiny, folder), "ckpt=auto"]
    process = subprocess.Popen([*line, "trainer.max_steps=100000", "trainer.ckpt_every=100000"], env=environment)
    try:
        wait_for_steps(process, folder)
    finally:
        for one in reversed(family(process.pid)):  # torchrun gives each of its processes a session of its own
            os.kill(one, signal.SIGKILL)
        process.wait()
    assert not RunFolder(folder).resumable()
    for last, said in ((3, ""), (5, "resuming after step 3"), (5, "is complete at step 5")):
        done = subprocess.run(
            [*line, f"trainer.max_steps={last}"], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert said in done.stdout
        assert steps(folder) == list(range(1, last + 1))
    assert not [path for path in folder.iterdir() if path.name.startswith(".start")]


@pytest.mark.parametrize("count", [1, 2])
def test_no_process_outlives_torchrun(count, tiny, tmp_path, environment):
    """Which may be killed, as by a system short of memory, and then ends nothing itself: they save and end."""
    folder = tmp_path / "run"
    program = [f"--nproc_per_node={count}" if "nproc" in word else word for word in TORCHRUN]
    line = [*program, *arguments(tiny, folder), "trainer.max_steps=100000", "trainer.ckpt_every=100000"]
    process = subprocess.Popen(line, env=environment)
    workers = []
    try:
        wait_for_steps(process, folder)
        workers = family(process.pid)[1:]
        assert len(workers) >= count
        process.kill()
        process.wait()
        deadline = time.monotonic() + 15
        while any(map(lives, workers)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert len(RunFolder(folder).step_checkpoints()) == 1
    finally:
        process.kill()
        for one in filter(lives, workers):
            os.kill(one, signal.SIGKILL)


def test_a_refused_launch_ends_at_once(tiny, tmp_path, environment):
    """Of both processes; nothing is left behind."""
    line = [*TORCHRUN, *arguments(tiny, tmp_path / "run")]
    for more, part in (
        (["data.path=nowhere/*.txt"], "matches no file"),
        (["model.d_model=0"], "model.d_model"),
        (["ckpt=last"], "not a run folder"),
    ):
        began = time.monotonic()
        done = subprocess.run(
            [*line, *more], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        assert done.returncode != 0
        assert part in done.stderr
        assert (
            "Traceback"
            not in done.stderr.partition("torch.distributed.elastic")[0]
            .partition("ChildFailedError")[0]
            .partition("E1")[0]
        )
        assert time.monotonic() - began < 60
        assert [path for path in tmp_path.rglob("*") if path.is_file() and "cache" not in path.parts] == []


def test_the_second_of_two_is_refused(tiny, tmp_path, environment):
    folder = tmp_path / "run"
    line = [sys.executable, str(TRAIN), *arguments(tiny, folder), "ckpt=auto"]
    first = subprocess.Popen([*line, "trainer.max_steps=100000"], env=environment)
    try:
        deadline = time.monotonic() + 120
        while not RunFolder(folder).resumable():
            assert first.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        second = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)
        assert (second.returncode, second.stderr.count("\n")) == (2, 1), second.stderr
        assert f"is being trained by process {first.pid} on " in second.stderr
    finally:
        first.terminate()
        first.wait()
    found = steps(folder)
    assert found == list(range(1, len(found) + 1))
