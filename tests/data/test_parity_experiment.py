"""experiments/parity/run.py does what its README says, at a size that takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_it_trains_both_models_and_writes_what_came_out(tmp_path, environment):
    command = [sys.executable, str(ROOT / "experiments/parity/run.py"), "--steps", "25", "--batch", "2", "--seeds", "1"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "curves.json").read_text(encoding="utf-8"))
    assert [result["model"] for result in results] == ["mamba3", "mamba2"]
    assert all(len(result["accuracy"]) == 256 and len(result["curve"]) == 1 for result in results)
    assert abs(results[0]["parameters"] / results[1]["parameters"] - 1) < 0.05, "of one size"
    assert "mamba3" in (tmp_path / "results.md").read_text(encoding="utf-8")
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
