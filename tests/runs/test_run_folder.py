"""Run folders as ``ckpt=`` and the commands find them."""

from __future__ import annotations

import hashlib
import time

import pytest

from hybridlm.cli.compose import compose_config
from hybridlm.config.load import to_yaml
from hybridlm.errors import UserError
from hybridlm.files.checksum import closing_line
from hybridlm.runs.resume import checkpoint_to_resume, refuse_other_optimizer, resumed_folder
from hybridlm.runs.run_folder import RunFolder, find_run

EMPTY_CHECKPOINT = closing_line(hashlib.sha256().hexdigest())


def run_in(root, name, overrides, steps=()):
    folder = RunFolder(root / "outputs" / name)
    folder.claim(to_yaml(compose_config(overrides)))
    folder.checkpoints.mkdir()
    for step in steps:
        folder.step_checkpoint(step).write_bytes(EMPTY_CHECKPOINT)
    return folder


def test_run_folder_is_claimed_once(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.claim("a: 1")
    with pytest.raises(UserError, match="ckpt=auto"):
        folder.claim("a: 2")
    assert folder.config.read_text() == "a: 1"


def test_find_run(tmp_path):
    for name, part in (("last", "no run under"), ("nope", "does not exist"), (".", "not a run folder")):
        with pytest.raises(UserError, match=part):
            find_run(name, tmp_path)
    first = run_in(tmp_path, "first", [], (1,))
    (tmp_path / "x.ckpt").touch()
    with pytest.raises(UserError, match=r"x\.ckpt"):
        find_run("x.ckpt", tmp_path)
    time.sleep(0.02)
    second = run_in(tmp_path, "second", [])
    with pytest.raises(UserError, match="no checkpoint yet"):
        find_run("last", tmp_path)
    second.step_checkpoint(20).write_bytes(EMPTY_CHECKPOINT)
    (second.path / "wandb").mkdir()
    (second.path / "wandb" / "config.yaml").touch()
    assert find_run("last", tmp_path) == (second, None)
    assert find_run("outputs/first", tmp_path) == (first, None)
    assert find_run("outputs/first/checkpoints/step-00000001.ckpt", tmp_path) == (first, first.step_checkpoint(1))


def test_best_is_the_best_validation_of_the_newest_run(tmp_path):
    folder = run_in(tmp_path, "run", [], (30,))
    with pytest.raises(UserError, match=r"best-\*\.ckpt"):
        find_run("best", tmp_path)
    folder.best_weights.touch()
    assert find_run("best", tmp_path) == (folder, folder.best_weights)
    for step in (10, 20, 30):
        folder.best_checkpoint(step).write_bytes(EMPTY_CHECKPOINT)
    rows = [(10, "val/bpb", 3.0), (20, "val/bpb", 2.5), (30, "val/bpb", 2.75), (30, "val/ema_loss", 1.0)]
    folder.metrics_jsonl.write_text("".join(f'{{"step": {step}, "{name}": {value}}}\n' for step, name, value in rows))
    assert find_run("best", tmp_path) == (folder, folder.best_checkpoint(20))
    folder.metrics_jsonl.write_text("damaged")
    assert find_run("best", tmp_path)[1] == folder.best_checkpoint(30)


def test_what_ckpt_means(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resumed_folder("auto", None) is None
    folder = run_in(tmp_path, "it's (1)", ["model=transformer", "seed=3", "trainer.max_steps=5"], (9, 100))
    assert resumed_folder(None, None) is resumed_folder("null", None) is None
    for ckpt in ("last", "auto", "outputs/it's (1)"):
        assert resumed_folder(ckpt, None) == folder
        assert checkpoint_to_resume(ckpt, folder).checkpoint.name == "step-00000100.ckpt"
    assert checkpoint_to_resume(str(folder.step_checkpoint(9)), folder).checkpoint == folder.step_checkpoint(9)
    with pytest.raises(UserError, match=r"hydra\.run\.dir=elsewhere"):
        resumed_folder(str(folder.path), "elsewhere")
    folder.weights.touch()
    with pytest.raises(UserError, match="init_from"):
        resumed_folder(str(folder.weights), None)
    for path in folder.step_checkpoints():
        path.unlink()
    assert resumed_folder("auto", None) is None, "it begins anew"
    folder.best_checkpoint(7).write_bytes(EMPTY_CHECKPOINT)
    assert checkpoint_to_resume("auto", folder).checkpoint == folder.best_checkpoint(7)


def test_another_optimizer_cannot_resume(tmp_path):
    old = compose_config(["model=transformer"])
    folder = RunFolder(tmp_path)
    refuse_other_optimizer(folder, old, compose_config(["model=transformer", "trainer.max_steps=9"]))
    with pytest.raises(UserError, match=r"optim.name: 'muon' -> 'adamw'"):
        refuse_other_optimizer(folder, old, compose_config(["model=transformer", "optim=adamw"]))
