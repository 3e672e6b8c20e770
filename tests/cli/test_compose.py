"""The command line as a user meets it: exit codes, one clear message, nothing left behind."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from hybridlm.cli.compose import compose_config, composed
from hybridlm.config.load import load_config, to_yaml
from hybridlm.config.overrides import split
from hybridlm.errors import UserError
from hybridlm.runs.run_folder import RunFolder

TRAIN = Path(__file__).parents[2] / "train.py"


def train(folder, *arguments):
    return subprocess.run(
        [sys.executable, str(TRAIN), *arguments], cwd=folder, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["model.pattern=TMX"], [["'TMX'", "position 3", "'X'", "T (transformer)"]]),
        (["model.patern=TM"], [["did you mean model.pattern?"]]),
        (["+model.patern=TM"], [["did you mean model.pattern?"]]),
        (["model.d_model=abc"], [["model.d_model = 'abc'", "an integer"]]),
        (["model=hybird_small"], [["model=hybird_small", "did you mean model=hybrid_small?", "transformer"]]),
        (["model.mamba2.head_dim=37"], [["2 x 192 = 384", "32 and 48"]]),
        (
            ["model.d_model=abc", "optim.schedule=cos", "sed=3", "--cfg", "job"],
            [["d_model"], ["cosine"], ["did you mean seed?"]],
        ),
        (["model.pattern=(TM*6", "hydra.run.dir=outputs/x"], [["never closed"]]),
        (
            ["optim.lr=1,2"],
            [
                [
                    "optim.lr=1,2: several values, but this takes one",
                    "--dry-run` plans each (a list is optim.lr=[a,b])",
                ]
            ],
        ),
        (["model.pattern=T,TM"], [["model.pattern=T,TM: several values, but this takes one; `hybridlm sweep`"]]),
        (["size=tiny,small"], [["size=tiny,small: several values"]]),
        (["optim.lr=interval(1e-4,1)"], [["optim.lr=interval(1e-4,1): several values"]]),
        (["--lr", "3", "--cfg", "job"], [["--lr 3: a field is set without dashes; lr is optim.lr here"]]),
        (["config/mine.py"], [["experiments=NAME"]]),
        (["a=(", "--cfg", "job"], [["'a=('", "quote"]]),
        (["fast"], [["'fast'", "field=value"]]),
        (["ckpt=last"], [["no run under"]]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value[0], str) else "",
)
def test_wrong_input_is_code_2_and_leaves_nothing(tmp_path, arguments, lines):
    began = time.perf_counter()
    result = train(tmp_path, *arguments)
    assert time.perf_counter() - began < 20  # about one second on an idle machine
    said = result.stderr.strip().splitlines()
    assert (result.returncode, result.stdout, len(said)) == (2, "", len(lines)), result
    for line, parts in zip(said, lines, strict=True):
        assert line.startswith(("config error: ", "error: "))
        assert [part for part in parts if part not in line] == []
    assert list(tmp_path.iterdir()) == []


def test_traceback_on_request(tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRIDLM_TRACEBACK", "1")
    assert "Traceback" in train(tmp_path, "seed=x").stderr


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("model: {patern: TM}", "did you mean model.pattern?"),
        ("model: {d_model: abc}", "an integer"),
        ("model: {pattern: TMX}", "position 3"),
        ("modle: {d_model: 3}", "did you mean model?"),
        ("data:\n  out: ???", "a value is required"),
        ("defaults: [override /model: hybird_small]", "did you mean model=hybrid_small?"),
        ("model: [", "expected"),
        ("model: {name: '${nowhere}'}", "nowhere"),
    ],
)
def test_mistakes_in_an_experiment(tmp_path, text, part):
    experiment = tmp_path / "conf" / "experiments" / "study" / "mine.yaml"
    experiment.parent.mkdir(parents=True)
    experiment.write_text(f"# @package _global_\n{text}\n")
    with pytest.raises(UserError) as caught:
        load_config(composed(split(["--config-dir", str(tmp_path / "conf"), "experiments=study/mine"])).tree)
    assert len(caught.value.problems) == 1
    assert part in caught.value.problems[0]
    assert "\n" not in caught.value.problems[0]


def test_an_experiment_of_a_folder_of_ones_own_through_the_command(tmp_path):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "mine.yaml").write_text("model: {d_model: 3}\n")
    result = train(tmp_path, "--config-dir", ".", "experiments=mine")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result
    assert "@package _global_" in result.stderr


def test_cfg_of_a_resume_accepts_a_record_that_the_overrides_correct(tmp_path):
    """As the resume itself does: the rules between fields are for the two together."""
    folder = RunFolder(tmp_path / "a")
    text = to_yaml(compose_config(["trainer.max_steps=100", "optim.warmup=50"]))
    folder.claim(text.replace("warmup: 50", "warmup: 200"))
    folder.checkpoints.mkdir()
    folder.step_checkpoint(10).write_bytes(b"")
    assert "optim.warmup" in train(tmp_path, "ckpt=a", "--cfg", "job").stderr
    result = train(tmp_path, "ckpt=a", "trainer.max_steps=300", "--cfg", "job")
    assert result.returncode == 0, result.stderr
    assert "max_steps: 300" in result.stdout


def test_cfg_prints_what_was_composed(tmp_path):
    result = train(tmp_path, "seed=3", "--cfg", "job", "model.pattern=(TM)*6", "experiments=smoke")
    assert result.returncode == 0, result
    tree = yaml.safe_load(result.stdout)
    assert (tree["seed"], tree["model"]["pattern"], tree["trainer"]["max_steps"], tree["size"]["name"]) == (
        3,
        "(TM)*6",
        20,
        "tiny",
    )
    assert list(tmp_path.iterdir()) == []


def test_help_and_verb(tmp_path):
    assert "hybrid_alternating" in train(tmp_path, "--help").stdout
    result = subprocess.run(
        [sys.executable, "-m", "hybridlm", "train", "-m", "--cfg", "job"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (result.returncode, "-m" in result.stderr) == (2, True), result


def test_a_wrong_point_of_a_sweep_does_not_stop_the_others(tmp_path):
    result = train(tmp_path, "-m", "model.pattern=(TX)*2,TMY", "optim.lr=1e-3", "model.mamba2.d_state=8")
    assert result.returncode == 2, result
    assert "'X'" in result.stdout
    assert "'Y'" in result.stdout
    assert "Traceback" not in result.stderr


def test_section_without_effect_in_a_sweep(capfd):
    from hybridlm.cli import start

    start._check_sweep(split(["-m", "++model.pattern=T,TT", "++optim.lr=1,2", "++model.mamba2.d_state=8"]))
    assert "model.mamba2.d_state has no effect" in capfd.readouterr().err
    start._check_sweep(split(["-m", "++model.pattern=T,TM", "++model.mamba2.d_state=8"]))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "choice", ["hydra/launcher=joblib", "hydra/launcher=submitit_local", "hydra/launcher=slurm", "hydra/sweeper=optuna"]
)
def test_a_plugin_that_is_missing_is_named_with_its_extra(choice):
    package = {"joblib": "hydra-joblib-launcher", "optuna": "hydra-optuna-sweeper"}.get(
        choice.partition("=")[2], "hydra-submitit-launcher"
    )
    if any(importlib.metadata.distributions(name=package)):
        pytest.skip(f"{package} is installed")
    with pytest.raises(UserError) as error:
        compose_config([choice])
    (problem,) = error.value.problems
    missing = choice.replace("slurm", "submitit_slurm")
    assert problem.endswith(f"{missing}: its Hydra plugin is not installed; pip install 'hybridlm[sweep]'")
