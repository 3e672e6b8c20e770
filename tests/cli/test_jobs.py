"""A run's folder belongs to one run: what is refused leaves every byte, what goes on reads values and runs nothing of a
stranger's."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shlex
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from hybridlm.cli.start import main
from hybridlm.cli.verbs import app
from hybridlm.errors import UserError
from hybridlm.runs.run_folder import JOB, SWEEP, RunFolder
from hybridlm.sweep.job import find

TRAIN = Path(__file__).parents[2] / "train.py"


def trained_with(tiny):
    return [line for line in tiny if "samples" not in line] + [
        "callbacks=none",
        "trainer.val_every=null",
        "logger=files",
    ]


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A run of 12 steps in outputs/a, and what the command printed."""
    place = tmp_path_factory.mktemp("place")
    os.chdir(place)
    with redirect_stdout(io.StringIO()) as printed:
        main([*trained_with(tiny), "hydra.run.dir=outputs/a"])
    return RunFolder(place / "outputs/a"), printed.getvalue()


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    """Its folder again, as outputs/a of the working directory."""
    shutil.copytree(finished[0].path, tmp_path / "outputs/a")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYBRIDLM_CACHE", str(tmp_path / "cache"))
    return RunFolder(tmp_path / "outputs/a")


def bytes_of(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(capfd, *arguments):
    """The line that refuses a command."""
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    said = capfd.readouterr().err.strip().splitlines()
    assert (end.value.code, len(said)) == (2, 1), said
    return said[0]


def test_a_refused_start_leaves_every_byte(run, capfd, corpus):
    more = ["ckpt=last", "trainer.max_steps=14"]
    before = bytes_of(run.path)
    for arguments, part in (
        ([*more, "data.global_batch=8"], "data.global_batch: 4 -> 8"),
        ([*more, "data.seq_len=16"], "data.seq_len: 32 -> 16"),
        ([*more, f"data.path={corpus}/0*.txt"], "validation text"),
        ([*more, "seed=5"], "seed: 0 -> 5"),
        ([*more, "data.tokenizer.kind=bpe"], "data.tokenizer"),
        ([*more, "model.d_model=64"], "model.d_model: 32 -> 64"),
        ([*more, "optim=adamw"], "optim.name: 'muon' -> 'adamw'"),
        ([*more, "hardware.memory_gb=1.0001"], "this run needs"),
        ([*more, "trainer.accumulate=2"], "trainer.accumulate=1"),
        ([*more, "callbacks=[1]"], "callbacks="),
        (["ckpt=last", "trainer.max_steps=4"], "already at step 12"),
        (["ckpt=outputs/a"], "already at step 12"),
        (["ckpt=outputs/a/weights.safetensors"], "optimizer state"),
        (["hydra.run.dir=outputs/a"], "ckpt=auto"),
        (["hydra.run.dir=outputs/a", "seed=4", "trainer.max_steps=1"], "ckpt=auto"),
    ):
        assert part in refused(capfd, *arguments), arguments
        assert bytes_of(run.path) == before, arguments
    assert [path.name for path in run.path.parent.iterdir()] == ["a"]
    newest = run.step_checkpoint(12)
    newest.write_bytes(newest.read_bytes()[:-9])
    before = bytes_of(run.path)
    assert "no checksum at its end" in refused(capfd, f"ckpt={newest}", "trainer.max_steps=14")
    with run.training():
        assert "is being trained by" in refused(capfd, "ckpt=auto", "trainer.max_steps=14")
    assert bytes_of(run.path) == before


def test_a_new_run_that_is_refused_leaves_no_folder(tiny, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert "this run needs" in refused(capfd, *trained_with(tiny), "hardware.memory_gb=1.0001")
    assert "matches no file" in refused(capfd, *trained_with(tiny), "data.path=nowhere/*.txt")
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_has_nothing_left_to_do(run, capfd):
    before = bytes_of(run.path)
    for arguments in (["ckpt=last"], ["ckpt=auto", "hydra.run.dir=outputs/a"], ["ckpt=auto"]):
        main(arguments)
        assert "trainer.max_steps=24" in capfd.readouterr().out
    assert bytes_of(run.path) == before


def test_what_is_changed_on_purpose_goes_on(run, corpus, capfd):
    main(["ckpt=last", "trainer.max_steps=14", f"data.path={corpus}/0*.txt", "data.changed=accept", "callbacks=ema"])
    assert "data        changed since step 12:" in capfd.readouterr().out
    config = yaml.safe_load(run.config.read_text())
    assert (config["data"]["changed"], config["trainer"]["max_steps"], config["callbacks"]["ema"]["decay"]) == (
        "refuse",
        14,
        0.999,
    )
    assert config["data"]["batch_size"] == config["trainer"]["accumulate"] == "auto"
    assert "trainer.max_steps=14" in " ".join(run.overrides())
    main(["ckpt=last", "trainer.max_steps=15"])  # today's text is its own now
    assert json.loads(run.summary.read_text())["steps"] == 15


def test_a_run_that_has_saved_nothing_begins_anew(run, tiny, capfd):
    shutil.rmtree(run.checkpoints)
    run.summary.unlink()
    before = bytes_of(run.path)
    assert "ckpt=auto" in refused(capfd, *trained_with(tiny), "hydra.run.dir=outputs/a")
    assert bytes_of(run.path) == before
    main([*trained_with(tiny), "hydra.run.dir=outputs/a", "ckpt=auto", "trainer.max_steps=3"])
    assert json.loads(run.summary.read_text())["steps"] == 3
    assert [json.loads(line)["step"] for line in run.metrics_jsonl.read_text().splitlines()] == [1, 2, 3]


def test_every_hint_works(finished, run, capfd, monkeypatch):
    """As it is printed: a shell's words."""
    hints = [line.strip() for line in finished[1].partition("next:\n")[2].splitlines()]
    on, write, draw = (shlex.split(hint, comments=True) for hint in hints)
    assert on == ["python", "train.py", "ckpt=last", "trainer.max_steps=24"]
    assert write[:4] == ["hybridlm", "generate", "last", "--prompt"]
    written = CliRunner().invoke(app, write[1:])
    assert (written.exit_code, written.output.startswith(write[4])) == (0, True), written.output
    drawn = CliRunner().invoke(app, draw[1:])
    assert (drawn.exit_code, (run.path / "report.html").is_file()) == (0, True), drawn.output
    main(on[2:])
    assert json.loads(run.summary.read_text())["steps"] == 24
    capfd.readouterr()
    shutil.move(run.path, "elsewhere")
    main(["ckpt=elsewhere", "trainer.max_steps=25"])
    assert "  python train.py ckpt=elsewhere trainer.max_steps=50 " in capfd.readouterr().out


def test_a_strangers_run_folder_runs_nothing(run, tmp_path, capfd, monkeypatch):
    evil = "# @package _global_\nhydra: {callbacks: {x: {_target_: os.system, command: 'touch PWNED'}}}\n"
    monkeypatch.setenv("SECRET", "s3cret")
    (tmp_path / "evil.yaml").write_text(evil)
    lines = [
        f"experiments={os.path.relpath(tmp_path, TRAIN.parent)}/../evil",
        "experiments=../../../evil",
        "+hydra.callbacks.x._target_=os.system",
    ]
    lines += ["hydra.searchpath=[file:///tmp]", "++data.path=${oc.env:SECRET}"]
    (run.path / ".hydra/overrides.yaml").write_text(yaml.safe_dump(lines))
    (run.path / ".hydra/config.yaml").write_text(evil)
    (run.path / ".hydra/hydra.yaml").write_text(evil)
    config = yaml.safe_load(run.config.read_text())
    config["callbacks"]["samples"]["prompts"] = ["${oc.env:SECRET}"]
    run.config.write_text(yaml.safe_dump(config))
    main(["ckpt=outputs/a", "trainer.max_steps=13", "callbacks.samples.tokens=2"])
    commands = [
        ["eval", "outputs/a", "data.val_fraction=0.3"],
        ["bench", "outputs/a", "--compare", "M", "--contexts", "8", "--rounds", "1"],
    ]
    for command in [*commands, ["report", "outputs/a"]]:
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, (command, result.output)
    said = capfd.readouterr()
    everything = "".join(
        path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".ckpt"
    )
    assert "s3cret" not in everything + said.out + said.err
    assert not list(tmp_path.rglob("PWNED"))
    for key, value in (
        ("hydra", {"callbacks": {"x": {"_target_": "os.system"}}}),
        ("_target_", "os.system"),
        ("experiments", "../evil"),
    ):
        run.config.write_text(yaml.safe_dump(config | {key: value}))
        assert f"{key}" in refused(capfd, "ckpt=outputs/a", "trainer.max_steps=15")


@pytest.mark.parametrize(
    "override",
    [
        "+hydra.callbacks.x._target_=os.system",
        "++hydra.callbacks={x: {_target_: os.system}}",
        "hydra/launcher=evil",
        "~hydra.callbacks",
        "experiments=../../evil",
        "experiments=/tmp/evil",
        "data@hydra.callbacks=evil",
        "data.path=${oc.env:HOME}",
        "data.path=$\\{oc.env:HOME\\}",
        "ckpt=elsewhere",
        "--config-dir=/tmp",
        "nothing=1",
        "data.path=x\nhydra.callbacks.x=1",
        "hydra",
        "",
    ],
)
def test_a_strangers_job_is_refused(tmp_path, monkeypatch, capfd, override):
    monkeypatch.chdir(tmp_path)
    job = {"number": 1, "name": "a", "overrides": [override], "point": {}, "seed": 0}
    (tmp_path / "s/01-a").mkdir(parents=True)
    (tmp_path / "s/01-a" / JOB).write_text(json.dumps(job))
    (tmp_path / "s" / SWEEP).write_text(json.dumps({"jobs": ["01-a"], "cwd": str(tmp_path)}))
    before = bytes_of(tmp_path)
    if override == "data.path=x\nhydra.callbacks.x=1":  # one value of one field
        assert find("s").read()[0].overrides == (override,)
        return
    result = CliRunner().invoke(app, ["sweep", "--resume", "s"])
    said = result.stderr.splitlines()
    assert (result.exit_code, len(said)) == (2, 1), result.output
    assert JOB in said[0]
    assert bytes_of(tmp_path) == before


def test_a_strangers_sweep_stays_in_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s").mkdir()
    for name in ("../elsewhere", "/tmp/x", "..", "", "a/b"):
        (tmp_path / "s" / SWEEP).write_text(json.dumps({"jobs": [name]}))
        with pytest.raises(UserError, match="jobs: "):
            find("s")
