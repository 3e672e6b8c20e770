"""docs/adding_a_mixer.md is built from its own code blocks in a copy of the package: the kind exists there, passes
`hybridlm check`, trains, and this package knows nothing of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hybridlm.config.mixers import MIXERS

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```\w+ (\S+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
REGISTRY = "hybridlm/config/mixers/__init__.py"


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the package in which the page has been followed."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("hybridlm", "conf"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    blocks = dict(BLOCK.findall((ROOT / "docs/adding_a_mixer.md").read_text(encoding="utf-8")))
    line = blocks.pop(REGISTRY)
    assert len(blocks) == 2
    for path, text in blocks.items():
        assert not (folder / path).exists()
        (folder / path).write_text(text, encoding="utf-8")
    registry = folder / REGISTRY
    before, entry, after = re.split(r"(?m)(^\s+\"\w+\.\w+\",\n)", registry.read_text(encoding="utf-8"), maxsplit=1)
    registry.write_text(before + entry + line + after, encoding="utf-8")
    return folder


def hybridlm(copy, *arguments):
    environment = os.environ | {"PYTHONPATH": str(copy), "HYBRIDLM_ROOT": str(copy)}
    done = subprocess.run(
        [sys.executable, "-m", "hybridlm", *arguments],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_new_kind_passes_check(copy):
    hybridlm(copy, "check", "model.pattern=(H T H:none)*2", "size=tiny")
    assert "mingru" not in MIXERS


def test_the_new_kind_trains(copy, corpus, tmp_path):
    run = tmp_path / "run"
    data = ["data=files", f"data.path={corpus}/*.txt", f"data.out={tmp_path}/data", "hardware=cpu"]
    steps = ["trainer.max_steps=20", "trainer.log_every=1", "callbacks=none", f"hydra.run.dir={run}"]
    hybridlm(copy, "train", "model.pattern=(H T)*2", "size=tiny", *data, *steps)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 0.3
