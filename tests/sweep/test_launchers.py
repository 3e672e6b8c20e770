"""``python train.py -m`` with the launchers and sweepers of the extra `sweep` that are installed."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow

TRAIN = Path(__file__).parents[2] / "train.py"
SEARCHED = "optim.lr=interval(1e-4,1e-2)"
TWO = ["model.pattern=T,MT"]
CHOICES = {
    "basic": (None, TWO),
    "joblib": ("hydra-joblib-launcher", ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", *TWO]),
    "submitit": ("hydra-submitit-launcher", ["hydra/launcher=submitit_local", *TWO]),
    "optuna": (
        "hydra-optuna-sweeper",
        ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1", SEARCHED],
    ),
}


@pytest.mark.parametrize("name", CHOICES)
def test_two_runs_with_matched_models(name, tiny, tmp_path, environment):
    package, more = CHOICES[name]
    if package is not None and not any(importlib.metadata.distributions(name=package)):
        pytest.skip(f"{package} is not installed: pip install 'hybridlm[sweep]'")
    given = [
        *tiny,
        "trainer.max_steps=4",
        "model.n_layers=2",
        "sweep.match=params",
        f"hydra.sweep.dir={tmp_path}/sweep",
        *more,
    ]
    done = subprocess.run(
        [sys.executable, str(TRAIN), "-m", *given], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    widths, rates = set(), set()
    for job in ("0", "1"):
        folder = tmp_path / "sweep" / job
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert json.loads((folder / "summary.json").read_text())["steps"] == 4
        assert config["sweep"]["matched"] is not None
        widths.add(config["model"]["mlp"]["d_ff"])
        rates.add(config["optim"]["lr"])
    assert len(rates if name == "optuna" else widths) == 2
    if name == "optuna":
        best = yaml.safe_load((tmp_path / "sweep" / "optimization_results.yaml").read_text())["best_value"]
        assert best == min(
            json.loads((tmp_path / "sweep" / job / "summary.json").read_text())["val/bpb"] for job in ("0", "1")
        )
