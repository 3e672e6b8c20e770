"""``init_from``: a new run from given weights, and what is refused before anything is written."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from hybridlm.cli.compose import compose_config
from hybridlm.cli.start import main
from hybridlm.config.load import from_yaml
from hybridlm.files.sealed import digest
from hybridlm.runs.checkpoint import load_run, read_checkpoint, weights_of
from hybridlm.runs.run_folder import RunFolder

TRAIN = Path(__file__).parents[2] / "train.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tiny):
    """Of the runs here, with a tokenizer of their own for the source alone."""
    keep = ("data=", "data.path", "data.out", "data.val", "data.seq_len", "data.global", "hardware", "trainer", "callb")
    return [line for line in tiny if line.startswith(keep)] + ["callbacks=none"]


@pytest.fixture(scope="module")
def source(tiny, tmp_path_factory):
    """A run of 12 steps with special tokens, in outputs/source."""
    place = tmp_path_factory.mktemp("place")
    os.chdir(place)
    with redirect_stdout(io.StringIO()):
        main([*tiny, "callbacks=none", "data.tokenizer.special_tokens=['<|a|>']", "hydra.run.dir=outputs/source"])
    return RunFolder(place / "outputs/source")


@pytest.fixture(autouse=True)
def place(source, tmp_path, monkeypatch):
    shutil.copytree(source.path, tmp_path / "outputs/source")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*arguments):
    with redirect_stdout(io.StringIO()) as printed:
        main(list(arguments))
    return printed.getvalue()


def refused(capfd, *arguments):
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    said = capfd.readouterr().err.strip().splitlines()
    assert (end.value.code, len(said)) == (2, 1), said
    assert not os.path.exists("outputs/new")
    return said[0]


def rows(folder):
    return [json.loads(line) for line in folder.metrics_jsonl.read_text().splitlines()]


def bare(place, name="bare"):
    """weights.safetensors, config.yaml and the tokenizer alone."""
    (place / name).mkdir()
    for file in ("weights.safetensors", "config.yaml", "tokenizer.json"):
        shutil.copy(place / "outputs/source" / file, place / name)
    return place / name


STILL = ["optim.lr=1e-30", "optim.muon.lr=1e-30", "trainer.max_steps=1", "trainer.val_every=1"]


@pytest.mark.parametrize("name", ["last", "best", "outputs/source", "bare"])
def test_the_loss_is_that_of_the_weights(data, place, name):
    bare(place)
    printed = train(*data, f"init_from={name}", "hydra.run.dir=outputs/new", *STILL)
    old, new = (RunFolder(place / "outputs" / run) for run in ("source", "new"))
    assert rows(new)[-1]["val/loss"] == pytest.approx(rows(old)[-1]["val/loss"], abs=1e-6)
    config = from_yaml(new.config.read_text())
    file = {"bare": place / "bare/weights.safetensors", "best": old.best_checkpoint(12)}.get(
        name, old.step_checkpoint(12)
    )
    assert config.init_from == str(file)
    assert config.model == from_yaml(old.config.read_text()).model
    weights = weights_of(read_checkpoint(old.step_checkpoint(12)))
    line = next(line for line in printed.splitlines() if line.startswith("weights "))
    assert (str(file) in line, "step 12" in line, digest("", weights)[:12] in line) == (True, True, True)
    assert new.tokenizer.read_bytes() == old.tokenizer.read_bytes()


def test_everything_but_the_weights_begins_anew(data, place):
    train(*data, "init_from=outputs/source", "hydra.run.dir=outputs/new", "callbacks=ema", *STILL, "seed=3")
    content = read_checkpoint(RunFolder(place / "outputs/new").step_checkpoint(1))
    assert content["global_step"] == 1
    assert content["hybridlm"]["data"]["seed"] == 3
    averages, weights = content["hybridlm_ema"], weights_of(content)
    assert all(torch.equal(average, weights[name]) for name, average in averages.items())


def test_a_killed_run_resumes_without_its_source(data, place, monkeypatch):
    whole = [*data, "init_from=outputs/source", "trainer.max_steps=8", "optim.schedule=constant"]
    train(*whole, "hydra.run.dir=outputs/whole")
    train(*whole, "hydra.run.dir=outputs/new", "trainer.max_steps=4")
    shutil.rmtree(place / "outputs/source")
    monkeypatch.setattr("hybridlm.train.resumed.given_weights", lambda config: pytest.fail("read again"))
    train(*whole, "hydra.run.dir=outputs/new", "ckpt=auto")  # as a job that is started again
    ends = [
        weights_of(read_checkpoint(RunFolder(place / f"outputs/{name}").step_checkpoint(8)))
        for name in ("whole", "new")
    ]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    train("ckpt=outputs/new", "trainer.max_steps=9")
    assert load_run("outputs/new", CPU).step == 9


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (["model.mamba2.d_state=16"], ["model.mamba2.d_state: 8 -> 16"]),
        (["model.norm_eps=1e-6"], ["model.norm_eps: 1e-05 -> 1e-06"]),
        (["model=mamba"], ["model.d_model: 32 -> 256"]),
        (["data.tokenizer.kind=bytes"], ["258 ids", "257"]),
        (["data.tokenizer.kind=bytes", "data.tokenizer.special_tokens=['<|b|>']"], ["'<|a|>'", "'<|b|>'"]),
        (["ckpt=last"], ["ckpt = last"]),
        (["sweep.match=params"], ["sweep.match"]),
    ],
)
def test_what_contradicts_the_weights_is_refused(data, capfd, given, parts):
    said = refused(capfd, *data, "init_from=outputs/source", "hydra.run.dir=outputs/new", *given)
    assert all(part in said for part in parts), said


def test_the_same_architecture_in_other_words_is_taken(source, tiny):
    model = [line for line in tiny if line.startswith("model.")]
    config = compose_config([*model, "model.n_layers=2", "model.init.std=0.1", f"init_from={source.path}"])
    assert config.model.n_layers == 2
    assert compose_config([f"init_from={source.path}", "data=synthetic"]).data.source == "synthetic"


def test_a_source_that_is_none_or_damaged_is_refused(data, place, capfd):
    begin = [*data, "hydra.run.dir=outputs/new"]
    (place / "theirs").mkdir()
    (place / "theirs/config.json").write_text("{}")
    assert "hybridlm import theirs" in refused(capfd, *begin, "init_from=theirs")
    assert "does not exist" in refused(capfd, *begin, "init_from=nowhere")
    folder = bare(place)
    weights = folder / "weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "damaged" in refused(capfd, *begin, "init_from=bare")
    weights.write_bytes(whole)
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("norm_eps: 1.0e-05", "norm_eps: 1.0e-04"))
    assert "model.norm_eps" in refused(capfd, *begin, "init_from=bare")
    (folder / "config.yaml").write_text("a: 1")
    assert "model section" in refused(capfd, *begin, "init_from=bare")


def test_a_sweep_starts_each_job_from_the_same_weights(data, place, capfd):
    arguments = [*data, "-m", "seed=1,2", "trainer.max_steps=1", "hydra.sweep.dir=sweep"]
    assert "last" in refused(capfd, *arguments, "init_from=last")
    train(*arguments, "init_from=outputs/source")
    jobs = [RunFolder(place / "sweep" / job) for job in ("0", "1")]
    assert len({digest("", weights_of(read_checkpoint(job.step_checkpoint(1)))) for job in jobs}) == 2
    for job in jobs:
        config = from_yaml(job.config.read_text())
        assert config.init_from == str(place / "outputs/source/checkpoints/step-00000012.ckpt")
        assert config.model.d_model == 32


@pytest.mark.slow
def test_two_ranks_start_from_the_same_weights(data, place, environment):
    for strategy in ("ddp", "fsdp2"):
        command = [*data, "init_from=outputs/source", f"hydra.run.dir=outputs/{strategy}", *STILL, "trainer.devices=2"]
        line = [sys.executable, str(TRAIN), *command, f"trainer.strategy={strategy}"]
        done = subprocess.run(line, cwd=place, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        new, old = RunFolder(place / "outputs" / strategy), RunFolder(place / "outputs/source")
        assert rows(new)[-1]["val/loss"] == pytest.approx(rows(old)[-1]["val/loss"], abs=1e-5)
