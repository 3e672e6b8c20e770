"""Checkpoints that a stranger made, with a right checksum, to be resumed from: refused in a line before anything is written."""

from __future__ import annotations

import copy
import hashlib
import io
import random

import pytest
import torch
from hostile import VALUES, mutated, refused_or_read, tensors

from hybridlm.checkpoint import read_checkpoint
from hybridlm.compose import compose_config
from hybridlm.files.checksum import closing_line
from hybridlm.run_folder import RunFolder
from hybridlm.train.resumed import Resumed
from hybridlm.train.run import run

PARTS = ("loops", "optimizer_states", "lr_schedulers", "callbacks", "state_dict", "hybridlm", "epoch", "global_step")


@pytest.fixture(scope="module")
def content(tiny, tmp_path_factory) -> dict[str, object]:
    folder = RunFolder(tmp_path_factory.mktemp("run") / "a")
    run(compose_config([*tiny, "trainer.max_steps=4"]), folder, None)
    return copy.deepcopy(read_checkpoint(folder.step_checkpoint(4)))


def write(path, content) -> None:
    archive = io.BytesIO()
    torch.save(content, archive)
    path.write_bytes(archive.getvalue() + closing_line(hashlib.sha256(archive.getvalue()).hexdigest()))


@pytest.mark.parametrize("seed", [range(150), pytest.param(range(150, 3_000), marks=pytest.mark.slow)], ids=["150", "2850"])
def test_a_mutated_checkpoint_is_refused_in_a_line_or_read(content, tmp_path, seed):
    path = tmp_path / "step-00000004.ckpt"
    write(path, content)
    assert Resumed.read(path).step == 4
    for number in seed:
        generator = random.Random(number)
        part = generator.choice(PARTS)
        changed = {**content, part: mutated(content[part], generator, strange)}
        if generator.random() < 0.1:
            del changed[part]
        write(path, changed)
        refused_or_read(lambda: Resumed.read(path))


def strange(generator: random.Random) -> object:
    return tensors(generator) if generator.random() < 0.3 else copy.deepcopy(generator.choice(VALUES))


@pytest.mark.parametrize("part", ["loops", "optimizer_states", "lr_schedulers", "epoch", "state_dict"])
def test_a_part_that_is_missing_or_none_is_refused(content, tmp_path, part):
    path = tmp_path / "step-00000004.ckpt"
    for changed in ({key: value for key, value in content.items() if key != part}, {**content, part: None}, {**content, part: {"a": "x"}}):
        write(path, changed)
        assert not refused_or_read(lambda: Resumed.read(path))
