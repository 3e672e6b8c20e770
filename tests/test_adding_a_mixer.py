"""docs/adding_a_mixer.md is built from its own code blocks in a copy of the package: the kind exists there, passes
`hybridlm check`, trains, and this package knows nothing of it."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from forks import forked

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
    """Runs a command of the copy, in a process that has imported everything but hybridlm."""

    def command():
        for name in [name for name in sys.modules if name.partition(".")[0] == "hybridlm"]:
            del sys.modules[name]
        sys.path.insert(0, str(copy))
        os.environ["HYBRIDLM_ROOT"] = str(copy)
        os.chdir(copy)
        verbs = importlib.import_module("hybridlm.cli.verbs")
        assert Path(verbs.__file__).is_relative_to(copy)
        verbs.run_app(arguments)

    with (copy / "said").open("w+", encoding="utf-8") as said:
        process = forked(command, output=said.fileno())
        process.join(300)
        assert process.exitcode == 0, said.read()


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
