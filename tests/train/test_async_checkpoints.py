"""Checkpoints that a thread writes while training continues: the same files as without, and nothing lost however a run
ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from run_ends import assert_equal, assert_same_end, rows

from hybridlm.cli.compose import compose_config
from hybridlm.errors import RunFailed
from hybridlm.runs.checkpoint import EMA_KEY, read_checkpoint
from hybridlm.runs.run_folder import RunFolder
from hybridlm.train.checkpoints import AtomicCheckpointIO, BackgroundCheckpointIO
from hybridlm.train.lightning_module import LitLM
from hybridlm.train.run import run
from hybridlm.train.stopping import Stopped

ASYNC = "trainer.async_checkpoints=true"
MANY = ["trainer.ckpt_every=2", "trainer.keep_last=9", "trainer.keep_best=2", "callbacks=ema", "optim=adamw"]
TRAIN = Path(__file__).parents[2] / "train.py"


class Held:
    """Writes that wait for training. ``until[4] = 6``: that of step 4 waits until step 6 is done; ``log``: which began
    and ended; ``at[6]`` is called when step 6 is done, before the writes that wait for it go on."""

    def __init__(self) -> None:
        self.until: dict[int, int] = {}
        self.full: list[int] = []  # writes of these steps find no room
        self.at: dict[int, object] = {}
        self.log: list[tuple[str, int]] = []
        self._done = [threading.Event() for _ in range(13)]

    def write(self, save, content, file) -> None:
        step = content["global_step"]
        self.log.append(("begin", step))
        if step in self.until:
            assert self._done[self.until[step]].wait(300)
        if step in self.full:
            file.error = OSError(28, "No space left on device")
        save(content, file)
        self.log.append(("end", step))

    def train(self, step: int) -> None:
        if step in self.at:
            self.at[step]()
        self._done[step].set()


@pytest.fixture
def held(monkeypatch) -> Held:
    held, save, training_step = Held(), torch.save, LitLM.training_step

    def step(module, batch, batch_idx):
        held.train(module.trainer.global_step)
        return training_step(module, batch, batch_idx)

    monkeypatch.setattr(torch, "save", lambda content, file: held.write(save, content, file))
    monkeypatch.setattr(LitLM, "training_step", step)
    return held


def no_thread_is_left() -> bool:
    return not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]


def contents(folder: RunFolder) -> dict[str, dict]:
    return {path.name: read_checkpoint(path) for path in (*folder.step_checkpoints(), *folder.best_checkpoints())}


def assert_same_files(ours: RunFolder, theirs: RunFolder) -> None:
    mine, its = contents(ours), contents(theirs)
    assert mine.keys() == its.keys()
    for name in mine:
        assert mine[name].keys() == its[name].keys()
        for part in (
            "global_step",
            "state_dict",
            "optimizer_states",
            "lr_schedulers",
            "callbacks",
            "loops",
            "hybridlm",
            EMA_KEY,
        ):
            if part in its[name]:
                assert_equal(mine[name][part], its[name][part], f"{name}: {part}")


def test_what_is_written_is_the_state_at_the_save(tmp_path, held):
    held.until[0] = 1
    weights = {"a": torch.zeros(3), "b": torch.ones(4)[::2]}
    state = {"global_step": 0, "state_dict": weights, "list": [weights["a"], {"x": 1}], "pair": (0.9, torch.tensor(1))}
    writer = BackgroundCheckpointIO(AtomicCheckpointIO())
    writer.save_checkpoint(state, tmp_path / "a.ckpt")
    weights["a"] += 1
    state["list"][1]["x"] = 2
    state["list"].append(3)
    held.train(1)
    writer.teardown()
    written = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert torch.equal(written["state_dict"]["a"], torch.zeros(3))
    assert torch.equal(written["list"][0], torch.zeros(3))
    assert written["list"][1:] == [{"x": 1}]
    assert written["pair"] == (0.9, torch.tensor(1))
    assert no_thread_is_left()


def test_the_files_are_those_of_a_run_that_waits(tiny, tmp_path, held):
    """Each write but the last goes on while the weights have changed twice since."""
    whole, ours = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "ours")
    run(compose_config([*tiny, *MANY]), whole, None)
    held.until |= {2: 3, 4: 5, 6: 7, 8: 9, 10: 11}
    held.log.clear()
    held._done = [threading.Event() for _ in range(13)]
    run(compose_config([*tiny, *MANY, ASYNC]), ours, None)
    assert held.log == [(event, step) for step in (2, 4, 6, 8, 10, 12) for event in ("begin", "end")], "one at a time"
    assert_same_end(ours, whole)
    assert_same_files(ours, whole)
    assert sorted(path.name for path in ours.path.iterdir()) == sorted(path.name for path in whole.path.iterdir())
    assert no_thread_is_left()


def test_the_old_one_stays_until_the_new_one_is_there(tiny, tmp_path, held):
    folder = RunFolder(tmp_path / "run")
    seen: dict[int, list[str]] = {}

    def look(step: int) -> None:
        seen[step] = [path.name for path in folder.step_checkpoints()]

    held.until |= {4: 6, 8: 10}
    held.at |= {step: lambda step=step: look(step) for step in (6, 10)}
    run(compose_config([*tiny, "trainer.keep_last=1", ASYNC]), folder, None)
    assert seen == {6: [], 10: ["step-00000004.ckpt"]}
    assert [path.name for path in folder.step_checkpoints()] == ["step-00000012.ckpt"]


def test_a_full_disk_is_reported_at_the_next_save_and_fails_only_the_last_one(tiny, tmp_path, held, capsys):
    config = compose_config([*tiny, "trainer.keep_best=2", ASYNC])
    folder, whole = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "whole")
    run(compose_config([*tiny, "trainer.keep_best=2"]), whole, None)
    capsys.readouterr()
    held.full.append(8)
    run(config, folder, None)
    said = capsys.readouterr().out
    assert said.count("No space left on device") == 2  # of two names
    (line,) = (line for line in said.splitlines() if f"{folder.step_checkpoint(8)}: " in line)
    assert line.startswith("warning     ")
    assert "step 4" in line
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == [
        *("best-00000004.ckpt", "best-00000012.ckpt", "step-00000004.ckpt", "step-00000012.ckpt")
    ]
    assert rows(folder) == rows(whole)
    held.full[:] = [12]
    last = RunFolder(tmp_path / "last")
    with pytest.raises(RunFailed, match=r"step-00000012.ckpt: .*No space left .* step 8"):
        run(config, last, None)
    assert no_thread_is_left()
    held.full.clear()
    run(config, last, last.newest_checkpoint())
    assert_same_end(last, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_waits_for_the_pending_write_and_its_own(tiny, tmp_path, held, number):
    config = compose_config([*tiny, "optim=adamw", "trainer.log_every=1", ASYNC])
    whole, broken = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "broken")
    run(config, whole, None)
    held._done = [threading.Event() for _ in range(13)]
    held.until[4] = 5
    held.at[5] = lambda: os.kill(os.getpid(), number)
    with pytest.raises(Stopped):
        run(config, broken, None)
    assert no_thread_is_left()
    assert [path.name for path in broken.step_checkpoints()] == ["step-00000006.ckpt", "step-00000004.ckpt"]
    held.at.clear()
    run(config, broken, broken.newest_checkpoint())
    assert_same_end(broken, whole)


@pytest.mark.parametrize("full", [False, True])
def test_a_run_that_fails_finishes_the_pending_write(tiny, tmp_path, held, capsys, full):
    def breaks() -> None:
        raise ValueError("broken")

    folder = RunFolder(tmp_path / "run")
    held.until[4] = 5
    held.at[6] = breaks
    held.full += [4] if full else []
    with pytest.raises(ValueError, match="broken"):
        run(compose_config([*tiny, ASYNC]), folder, None)
    assert no_thread_is_left()
    assert bool(folder.step_checkpoints()) != full
    said = capsys.readouterr().out
    assert ("step-00000004.ckpt: cannot be written (No space left on device)" in said) == full
    assert not list(folder.path.glob("**/.*.partial"))


def test_a_run_killed_before_its_best_checkpoint_was_named_keeps_it(tiny, tmp_path):
    """The file of a step gets its second name at the next save; a resume makes up for it."""
    folder, killed = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "killed")
    run(compose_config([*tiny, "trainer.max_steps=8", "optim.schedule=constant"]), folder, None)
    shutil.copytree(folder.path, killed.path)
    for path in killed.best_checkpoints():
        path.unlink()
    run(compose_config([*tiny, "optim.schedule=constant"]), killed, killed.step_checkpoint(8))
    run(compose_config([*tiny, "optim.schedule=constant"]), folder, folder.step_checkpoint(8))
    assert_same_files(killed, folder)


def test_a_rollback_waits_for_the_pending_write(tiny, tmp_path, monkeypatch, capsys):
    """It goes back to the same step as a run that writes at once."""
    training_step, save, late = LitLM.training_step, torch.save, threading.Event()

    def spoiled(module, batch, batch_idx):
        output = training_step(module, batch, batch_idx)
        if module.trainer.global_step in (4, 5, 6):
            output["loss"] = output["loss"] * torch.nan
        return output

    def slow(content, file) -> None:
        late.wait(1.5 if content["global_step"] == 4 else 0)
        save(content, file)

    monkeypatch.setattr(LitLM, "training_step", spoiled)
    monkeypatch.setattr(torch, "save", slow)
    settings = [*tiny, "trainer.guard.rollback_after=3", "trainer.log_every=1", "callbacks=ema"]
    whole, ours = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "ours")
    run(compose_config(settings), whole, None)
    run(compose_config([*settings, ASYNC]), ours, None)
    assert [line for line in capsys.readouterr().out.splitlines() if "rollback" in line and " step 4 " in line][1:]
    assert_same_files(ours, whole)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_write_the_same_files(tiny, tmp_path, environment, strategy):
    """FSDP2 gathers the whole state before anything is written, so the thread needs no other rank."""
    settings = [
        *tiny,
        *MANY[:3],
        "optim=adamw",
        "trainer.devices=2",
        f"trainer.strategy={strategy}",
        "trainer.headless=true",
    ]
    folders = [RunFolder(tmp_path / name) for name in ("whole", "ours")]
    for folder, extra in zip(folders, ("false", "true"), strict=True):
        line = [
            sys.executable,
            str(TRAIN),
            *settings,
            f"trainer.async_checkpoints={extra}",
            f"hydra.run.dir={folder.path}",
        ]
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    assert_same_end(folders[1], folders[0])
    assert_same_files(folders[1], folders[0])
