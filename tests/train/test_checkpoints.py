"""Which checkpoints a run keeps, that damage is found wherever it is, and what a resume makes of it."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from run_ends import assert_same_end, rows

from hybridlm.cli.compose import compose_config
from hybridlm.errors import RunFailed, UserError
from hybridlm.files.checksum import SIZE, damage
from hybridlm.optim.optimizer import HybridOptimizer
from hybridlm.runs.checkpoint import KEY, export_weights, load_run, read_checkpoint, read_weights
from hybridlm.runs.resume import checkpoint_to_resume
from hybridlm.runs.run_folder import RunFolder
from hybridlm.train.checkpoints import AtomicCheckpointIO
from hybridlm.train.run import run
from hybridlm.train.schedule import lr_factor
from hybridlm.train.trainer import seed_everything

CPU = torch.device("cpu")


def names(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in folder.checkpoints.iterdir())


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> RunFolder:
    folder = RunFolder(tmp_path_factory.mktemp("run") / "a")
    run(compose_config(tiny), folder, None)
    return folder


@pytest.fixture
def copy(finished, tmp_path) -> RunFolder:
    """The finished run again, without what stands behind the last step."""
    shutil.copytree(finished.path, tmp_path / "copy")
    (tmp_path / "copy/summary.json").unlink()
    return RunFolder(tmp_path / "copy")


def places(path: Path) -> dict[str, int]:
    """An offset in each kind of byte that a checkpoint has."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        pickled = next(info for info in archive.infolist() if info.filename.endswith("data.pkl"))
        tensors = [info for info in archive.infolist() if "/data/" in info.filename]
        directory = archive.start_dir
    largest = max(tensors, key=lambda info: info.file_size)
    return {
        "first byte": 0,
        "header of an entry": pickled.header_offset + 5,
        "pickle": pickled.header_offset + 200,
        "header of a tensor": largest.header_offset + 1,
        "first tensor": tensors[0].header_offset + 100,
        "tensor": largest.header_offset + largest.file_size // 2,
        "sign of a number": largest.header_offset + largest.file_size // 2 // 4 * 4 + 3,
        "central directory": directory + 20,
        "end of the archive": size - SIZE - 1,
        "mark of the checksum": size - SIZE + 3,
        "checksum": size - 20,
        "last byte": size - 1,
    }


PLACES = [
    "first byte",
    "header of an entry",
    "pickle",
    "header of a tensor",
    "first tensor",
    "tensor",
    "sign of a number",
]
PLACES += ["central directory", "end of the archive", "mark of the checksum", "checksum", "last byte"]


@pytest.mark.parametrize("bit", [0, 7])
@pytest.mark.parametrize("place", PLACES)
def test_a_flipped_bit_is_found_and_the_previous_checkpoint_used(copy, caplog, place, bit):
    newest = copy.step_checkpoint(12)
    raw = bytearray(newest.read_bytes())
    raw[places(newest)[place]] ^= 1 << bit
    newest.write_bytes(raw)
    assert damage(newest) is not None
    with pytest.raises(UserError) as caught:
        read_checkpoint(newest)
    assert "\n" not in str(caught.value)
    assert copy.newest_checkpoint() == copy.step_checkpoint(8)
    (line,) = caplog.messages
    assert str(newest) in line
    assert "using step-00000008.ckpt" in line


@pytest.mark.parametrize("kept", [0, 1, 60, 5000, 0.5, -SIZE - 1, -SIZE, -SIZE + 1, -1])
def test_truncation_is_found_wherever_it_is(copy, kept):
    newest = copy.step_checkpoint(12)
    raw = newest.read_bytes()
    newest.write_bytes(raw[: int(kept * len(raw)) if isinstance(kept, float) else kept])
    with pytest.raises(UserError):
        read_checkpoint(newest)
    assert copy.newest_checkpoint() == copy.step_checkpoint(8)
    assert load_run(str(copy.path), CPU).step == 8


def test_every_byte_counts(tmp_path):
    path = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint({"x": torch.arange(3)}, path)
    raw = path.read_bytes()
    for i in range(0, len(raw), 7):
        other = tmp_path / f"{i}.ckpt"
        other.write_bytes(raw[:i] + bytes([raw[i] ^ 16]) + raw[i + 1 :])
        assert damage(other) is not None
        other.write_bytes(raw[:i])
        assert damage(other) is not None
        other.unlink()
    assert damage(path) is None


def test_a_resume_uses_the_newest_intact_checkpoint(tiny, finished, copy, caplog):
    """Metrics are cut back to it, the damaged one and the best one of the course given up do not count any more."""
    newest = copy.step_checkpoint(12)
    newest.write_bytes(newest.read_bytes()[:-9])
    (copy.checkpoints / ".step-00000012.ckpt.999999999.partial").write_bytes(b"half")
    resume = checkpoint_to_resume("last", copy)
    assert resume.checkpoint == copy.step_checkpoint(8)
    with pytest.raises(UserError, match=r"no checksum at its end.*ckpt=last"):
        checkpoint_to_resume(str(newest), copy)
    run(compose_config(tiny), copy, resume.checkpoint)
    assert_same_end(copy, finished)
    assert names(copy) == names(finished)


def test_auto_does_not_start_over_damaged_checkpoints(tiny, copy):
    for path in copy.step_checkpoints():
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"step-00000012.ckpt: no checksum.*step-00000008.ckpt") as caught:
        checkpoint_to_resume("auto", copy)
    assert "\n" not in str(caught.value)


def test_checkpoints_later_than_the_resumed_one_stay_until_there_is_a_newer_one(copy):
    copy.rewind(8)
    assert names(copy) == ["best-00000012.ckpt.superseded", "step-00000008.ckpt", "step-00000012.ckpt.superseded"]
    assert copy.newest_checkpoint() == copy.step_checkpoint(8)
    copy.drop_superseded()
    assert names(copy) == ["step-00000008.ckpt"]


def test_partial_files_of_dead_processes_are_removed_and_those_of_living_ones_kept(copy):
    living = copy.checkpoints / f".a.ckpt.{os.getppid()}.partial"
    for path in (
        living,
        copy.checkpoints / f".a.ckpt.{os.getpid()}.partial",
        copy.path / ".config.yaml.999999999.partial",
        copy.path / ".config.yaml.99999999999999999999.partial",  # larger than any process id
    ):
        path.write_bytes(b"half")
    copy.rewind(12)
    assert list(copy.path.glob("**/.*.partial")) == [living]


def test_a_run_killed_after_its_last_step_still_validates_and_writes_its_summary(tiny, finished, copy):
    """A run that was killed in its last validation is not refused for having no steps left."""
    run(compose_config(tiny), copy, copy.newest_checkpoint())
    assert_same_end(copy, finished)
    ours, theirs = (json.loads(folder.summary.read_text()) for folder in (copy, finished))
    assert (ours["val/bpb"], ours["steps"]) == (theirs["val/bpb"], theirs["steps"])


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "steps", "best"), [(1, 0, [12], 0), (2, 2, [9, 12], 2), (9, 9, [3, 6, 9, 12], 3)]
)
def test_last_and_best_are_kept(tiny, tmp_path, keep_last, keep_best, steps, best):
    folder = RunFolder(tmp_path / "a")
    kept = [f"trainer.keep_last={keep_last}", f"trainer.keep_best={keep_best}", "trainer.ckpt_every=3"]
    run(compose_config([*tiny, *kept]), folder, None)
    assert [path.name for path in folder.step_checkpoints()] == [f"step-{step:08d}.ckpt" for step in reversed(steps)]
    scores = {row["step"]: row["val/bpb"] for row in rows(folder) if row["val/bpb"] is not None}
    ranked = sorted(scores, key=scores.__getitem__)[:best]
    assert folder.best_checkpoints() == [folder.best_checkpoint(step) for step in sorted(ranked, reverse=True)]
    for step in ranked:
        assert read_checkpoint(folder.best_checkpoint(step))["global_step"] == step


def test_a_full_disk_fails_only_the_last_save(tiny, finished, tmp_path, monkeypatch, capsys):
    """The third of the checkpoints cannot be written; at the last step that is an error, and a resume makes up for
    it."""
    folder, save = RunFolder(tmp_path / "a"), torch.save
    full: list[int] = []

    def limited(content, file):
        if content["global_step"] in full:
            file.write(b"half")
            file.error = OSError(28, "No space left on device")
        save(content, file)

    monkeypatch.setattr(torch, "save", limited)
    full.append(8)
    run(compose_config(tiny), folder, None)
    said = capsys.readouterr().out
    assert said.count("No space left on device") == 2  # the one of this step, and the best one
    (line,) = (line for line in said.splitlines() if f"{folder.step_checkpoint(8)}: " in line)
    assert line.startswith("warning     ")
    assert "step 4" in line
    assert_same_end(folder, finished)
    assert names(folder) == ["best-00000012.ckpt", "step-00000004.ckpt", "step-00000012.ckpt"]
    full[:] = [12]
    shutil.rmtree(folder.path)
    with pytest.raises(RunFailed, match=r"step-00000012.ckpt: .*No space left .* step 8"):
        run(compose_config(tiny), folder, None)
    assert not list(folder.path.glob("**/.*.partial"))
    full.clear()
    run(compose_config(tiny), folder, folder.newest_checkpoint())
    assert_same_end(folder, finished)


def test_weights_alone_load_and_are_checked(finished, tmp_path):
    ours, theirs = load_run(str(finished.weights), CPU), load_run(str(finished.newest_checkpoint()), CPU)
    assert (ours.step, ours.tokenizer.fingerprint) == (12, theirs.tokenizer.fingerprint)
    for name, tensor in theirs.model.state_dict().items():
        assert torch.equal(ours.model.state_dict()[name], tensor)
    assert load_run(str(finished.best_weights), CPU).step == 12
    path = tmp_path / "a.safetensors"
    export_weights(finished.newest_checkpoint(), path)
    raw = path.read_bytes()
    assert read_weights(path)[KEY].keys() == read_checkpoint(finished.newest_checkpoint())[KEY].keys()
    for place in (3, 300, len(raw) - 40):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        with pytest.raises(UserError):
            read_weights(path)


class Rates:
    """Rates that the optimizer used, by the number of its calls."""

    def __init__(self, monkeypatch) -> None:
        self.used: list[list[float]] = []
        step = HybridOptimizer.step

        def recorded(optimizer, closure=None):
            result = step(optimizer, closure)
            if not optimizer.grad_norm.is_meta:  # the plan's step, on weights without contents
                self.used.append([group["lr"] for group in optimizer.param_groups])
            return result

        monkeypatch.setattr(HybridOptimizer, "step", recorded)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_run_resumed_with_more_steps_uses_the_rates_of_its_own_schedule(tiny, tmp_path, monkeypatch, schedule):
    """Also the first step after the resume, whose rate stands in the checkpoint: 0, at the end of the shorter decay."""
    rates, settings = Rates(monkeypatch), ["optim=adamw", f"optim.schedule={schedule}", "optim.warmup=2"]
    run(compose_config([*tiny, *settings, "trainer.max_steps=12"]), RunFolder(tmp_path / "long"), None)
    long, rates.used = rates.used, []
    folder = RunFolder(tmp_path / "short")
    run(compose_config([*tiny, *settings, "trainer.max_steps=6"]), folder, None)
    rates.used = []
    run(compose_config([*tiny, *settings, "trainer.max_steps=12"]), folder, folder.newest_checkpoint())
    assert rates.used == long[6:]
    rates.used = []
    config = compose_config([*tiny, *settings, "trainer.max_steps=16", "optim.lr=0.5", "optim.weight_decay=0.25"])
    run(config, folder, folder.newest_checkpoint())
    assert rates.used == [
        [0.5 * lr_factor(step, config.optim, 16)] * len(rates.used[0]) for step in range(12, 16)
    ]  # today's rate holds
    decays = {
        group["weight_decay"]
        for group in read_checkpoint(folder.step_checkpoint(16))["optimizer_states"][0]["param_groups"]
    }
    assert decays == {0.0, 0.25}


@pytest.mark.parametrize(
    "extra",
    [
        ["data.workers=2", "trainer.accumulate=2", "optim=muon"],
        ["trainer.accumulate=2", "trainer.keep_last=9", "optim=adamw"],
    ],
)
def test_resumed_twice_from_anywhere_is_bit_for_bit_the_uninterrupted_run(tiny, tmp_path, extra):
    """From steps with and without a validation behind them, inside an epoch and at its end; each time metrics go back
    with it."""
    config = compose_config([*tiny, *extra, "trainer.ckpt_every=1", "trainer.keep_last=12"])
    whole, broken = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "broken")
    run(config, whole, None)
    shutil.copytree(whole.path, broken.path)
    for step in (8, 3, 7):
        broken.summary.unlink()
        run(config, broken, broken.step_checkpoint(step))
        assert_same_end(broken, whole)


def test_random_numbers_depend_on_the_step_alone():
    import random

    import numpy as np

    def draw(*place: int) -> tuple[float, float, float]:
        seed_everything(*place)
        return float(torch.rand(())), float(np.random.rand()), random.random()

    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    drawn = [draw(*place) for place in places]
    assert drawn == [draw(*place) for place in places]
    assert len({number for numbers in drawn for number in numbers}) == 12


def test_a_resume_keeps_its_accumulation_whatever_the_plan(tiny, tmp_path, monkeypatch):
    """On a machine of less memory the plan would cut steps in another way; a number that the user gives is still
    refused."""
    folder = RunFolder(tmp_path / "run")
    run(compose_config([*tiny, "trainer.accumulate=2"]), folder, None)
    longer = [*tiny, "trainer.max_steps=14"]
    run(compose_config(longer), folder, folder.newest_checkpoint())
    assert read_checkpoint(folder.newest_checkpoint())[KEY]["accumulate"] == 2
    assert json.loads(folder.summary.read_text())["steps"] == 14
    with pytest.raises(UserError, match=r"resume with trainer\.accumulate=2"):
        run(compose_config([*tiny, "trainer.max_steps=16", "trainer.accumulate=1"]), folder, folder.newest_checkpoint())
    with pytest.raises(UserError, match=r"resume with trainer\.accumulate=2"):
        run(compose_config([*tiny, "trainer.max_steps=16", "data.batch_size=4"]), folder, folder.newest_checkpoint())


def test_a_run_that_does_not_fit_is_refused_before_data_are_read(tiny, tmp_path):
    config = compose_config([*tiny, "hardware.memory_gb=1.0001", "data.path=nowhere/*.txt"])
    with pytest.raises(UserError, match=r"this run needs .* of memory"):
        run(config, RunFolder(tmp_path / "run"), None)
    assert not (tmp_path / "run").exists()
