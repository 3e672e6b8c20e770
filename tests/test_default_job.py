"""What a newcomer sees first: `python train.py` without an argument."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_default_job_compresses_better_than_gzip_and_xz(tmp_path, environment):
    environment.pop("OMP_NUM_THREADS")
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py")], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = tmp_path.glob("outputs/*/*/summary.json")
    summary = json.loads(path.read_text())
    assert summary["val/bpb"] < summary["xz_bpb"] < summary["gzip_bpb"]
    assert done.stdout.count("sample ") == 3
    assert "ckpt=last" in done.stdout
