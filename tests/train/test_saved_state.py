"""Checkpoints that a stranger made, with a right checksum, to be resumed from: refused in a line before anything is
written."""

from __future__ import annotations

import copy
import hashlib
import io
import os
import random
import re
import shutil
from collections.abc import Iterator

import pytest
import torch
from hostile import VALUES, mutated, refused_or_read, tensors

from hybridlm.cli.compose import compose_config
from hybridlm.config.run import RunConfig
from hybridlm.errors import UserError
from hybridlm.files.checksum import closing_line
from hybridlm.runs.checkpoint import EMA_KEY, KEY, read_checkpoint
from hybridlm.runs.resume import Call
from hybridlm.runs.run_folder import RunFolder
from hybridlm.train.resumed import Resumed
from hybridlm.train.run import run

PARTS = (
    "loops",
    "optimizer_states",
    "callbacks",
    "state_dict",
    "hybridlm",
    "global_step",
    "pytorch-lightning_version",
    EMA_KEY,
)


@pytest.fixture(scope="module")
def original(tiny, tmp_path_factory) -> tuple[RunFolder, RunConfig, dict[str, object]]:
    """A run of four steps, its configuration with two more, and what its last checkpoint holds."""
    folder = RunFolder(tmp_path_factory.mktemp("run") / "a")
    overrides = [
        *tiny,
        "trainer.max_steps=4",
        "trainer.guard.spike_sigma=6",
        "callbacks.ema.decay=0.9",
        "callbacks.early_stop.patience=9",
        "callbacks.samples.tokens=1",
    ]
    run(compose_config(overrides), folder, None)
    config = compose_config([*overrides, "trainer.max_steps=5", "trainer.val_every=9", "trainer.val_batches=1"])
    return folder, config, copy.deepcopy(read_checkpoint(folder.step_checkpoint(4)))


def write(path, content) -> None:
    archive = io.BytesIO()
    torch.save(content, archive)
    path.write_bytes(archive.getvalue() + closing_line(hashlib.sha256(archive.getvalue()).hexdigest()))


def mutation(content: dict[str, object], number: int) -> dict[str, object]:
    """Half of them are of the right kinds, with another number or other values in a tensor."""
    generator = random.Random(number)
    part = generator.choice(PARTS)
    if generator.random() < 0.5:
        place = generator.choice(list(numbers(content[part], part)) or ["global_step"])
        return at(content, place, lambda value: nudged(value, generator))
    changed = {**content, part: mutated(content[part], generator, strange)}
    if generator.random() < 0.1:
        del changed[part]
    return changed


def numbers(tree: object, place: str) -> Iterator[str]:
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from numbers(value, f"{place}/{key}")
    elif isinstance(tree, int | float | torch.Tensor):
        yield place


def nudged(value: object, generator: random.Random) -> object:
    if isinstance(value, torch.Tensor):
        return torch.full_like(value, generator.choice([0, -1, 1e30, float("nan"), float("inf")]))
    if isinstance(value, bool):
        return not value
    return type(value)(generator.choice([0, 1, 2, value + 1, value - 1, 1000, 2**31, 2**39]))


@pytest.mark.parametrize(
    "seed", [range(40), pytest.param(range(40, 3_000), marks=pytest.mark.slow)], ids=["40", "2960"]
)
def test_a_mutated_checkpoint_is_refused_in_a_line_or_read(original, tmp_path, seed):
    _, config, content = original
    path = tmp_path / "step-00000004.ckpt"
    write(path, content)
    assert Resumed.read(path, config).step == 4
    for number in seed:
        write(path, mutation(content, number))
        refused_or_read(lambda: Resumed.read(path, config))


@pytest.mark.parametrize("seed", [range(6), pytest.param(range(6, 300), marks=pytest.mark.slow)], ids=["6", "294"])
def test_what_is_accepted_can_be_resumed_and_what_is_refused_touches_nothing(original, tmp_path, seed):
    folder, config, content = original
    trained = 0
    for number in seed:
        own = RunFolder(tmp_path / str(number))
        shutil.copytree(folder.path, own.path)
        write(own.step_checkpoint(4), mutation(content, number))
        before = snapshot(own)
        if refused_or_read(lambda own=own: Resumed.read(own.step_checkpoint(4), config)):
            trained += refused_or_read(lambda own=own: run(config, own, own.step_checkpoint(4), Call(named=True)))
        else:
            refused_or_read(lambda own=own: run(config, own, own.step_checkpoint(4), Call(named=True)))
            assert snapshot(own) == before
        shutil.rmtree(own.path)
    assert 0 < trained < len(seed)


def snapshot(folder: RunFolder) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.path.rglob("*")) if path.is_file()}


def strange(generator: random.Random) -> object:
    return tensors(generator) if generator.random() < 0.3 else copy.deepcopy(generator.choice(VALUES))


@pytest.mark.parametrize("part", ["loops", "optimizer_states", "callbacks", "state_dict", "pytorch-lightning_version"])
def test_a_part_that_is_missing_or_none_is_refused(original, tmp_path, part):
    _, config, content = original
    path = tmp_path / "step-00000004.ckpt"
    for changed in ({key: value for key, value in content.items() if key != part}, {**content, part: None}):
        write(path, changed)
        assert not refused_or_read(lambda: Resumed.read(path, config))


@pytest.mark.parametrize(
    "name", ["config.yaml", "metrics.jsonl", "train.lock", "train.log", "wandb_id.txt", "anything"]
)
def test_a_run_folder_with_links_or_pipes_is_not_written_to(original, tmp_path, name):
    own = RunFolder(tmp_path / "run")
    shutil.copytree(original[0].path, own.path)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (own.path / name).unlink(missing_ok=True)
    for make in (lambda: (own.path / name).symlink_to(victim), lambda: os.mkfifo(own.path / name)):
        make()
        with pytest.raises(UserError, match="not a regular file"), own.training() as holding:
            holding.sign()
        (own.path / name).unlink()
    assert victim.read_text() == "precious"


def test_the_checkpoints_folder_may_be_a_link_to_another_disk(original, tmp_path):
    own = RunFolder(tmp_path / "run")
    shutil.copytree(original[0].path, own.path)
    shutil.move(own.checkpoints, tmp_path / "disk")
    own.checkpoints.symlink_to(tmp_path / "disk")
    with own.training():
        assert own.newest_checkpoint() == own.step_checkpoint(4)


@pytest.mark.parametrize("text", ["../../x\n", "a*\n", "a\nb/c\n", "", "a\x1b\n", "a\nb\nc\nd\n", "x" * 5000])
def test_an_invalid_wandb_id_is_refused(tmp_path, text):
    folder = RunFolder(tmp_path)
    assert folder.wandb_run() is None
    folder.wandb_id.write_text(text)
    assert not refused_or_read(folder.wandb_run)
    folder.wandb_id.write_text("ab12\nmine\n\n")
    assert folder.wandb_run() == {"id": "ab12", "project": "mine", "entity": None}
    folder.wandb_id.write_text("ab12\nmine\nus\n")
    assert folder.wandb_run() == {"id": "ab12", "project": "mine", "entity": "us"}


def at(tree: object, path: str, value: object) -> object:
    """``tree`` with another value at a path of keys; None: without it; a function: with what that makes of it."""
    tree = copy.deepcopy(tree)
    *outer, last = [int(key) if key.isdigit() else key for key in path.split("/")]
    holder = tree
    for key in outer:
        holder = holder[key]
    if value is None:
        del holder[last]
    else:
        holder[last] = value(holder[last]) if callable(value) else value
    return tree


LOOP = "loops/fit_loop"
LOADER = f"{LOOP}/state_dict/combined_loader/0"
PROGRESS = f"{LOOP}/epoch_loop.automatic_optimization.optim_progress/optimizer/step"
MOMENTS = "optimizer_states/0/state/0"


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (f"{LOADER}/accumulate", 0, "accumulate"),
        (f"{LOADER}/batches", -1, "batches"),
        (f"{LOADER}/batches", 5, "position in the data"),
        (f"{LOADER}/epoch", 2**39, "position in the data"),
        (f"{LOADER}/global_batch", None, "combined_loader"),
        (f"{MOMENTS}/exp_avg", torch.zeros(3), "exp_avg of model.embedding.weight has shape"),
        (f"{MOMENTS}/exp_avg", torch.zeros(384, 32, dtype=torch.float16), "exp_avg of model.embedding.weight"),
        (f"{MOMENTS}/exp_avg_sq", None, "has exp_avg, step"),
        (f"{MOMENTS}/step", 1.0, "not a tensor"),
        ("optimizer_states/0/param_groups/0/params", [1], "parameters"),
        ("optimizer_states/0/param_groups/0/params", [], "groups"),
        ("callbacks/GuardCallback/rate_scale", -1.0, "GuardCallback"),
        ("callbacks/Checkpoints/best", {"x": 1.0}, "Checkpoints"),
        ("callbacks/EarlyStop/best_score", "x", "best_score"),
        ("callbacks/EarlyStop/wait_count", -1, "wait_count"),
        ("pytorch-lightning_version", "1.0.0", "lightning_version"),
        (f"{EMA_KEY}/norm.weight", torch.zeros(2), "norm.weight has shape"),
        (f"{EMA_KEY}/norm.weight", None, "running average lacks norm.weight"),
        (f"{KEY}/model/norm_eps", 0.5, "model.norm_eps: 0.5 ->"),
    ],
)
def test_each_inconsistency_is_refused_with_its_place(original, tmp_path, place, value, reason):
    _, config, content = original
    path = tmp_path / "step-00000004.ckpt"
    write(path, at(content, place, value))
    with pytest.raises(UserError, match=re.escape(reason)):
        Resumed.read(path, config)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (f"{PROGRESS}/total/completed", 3),
        (f"{LOOP}/epoch_loop.batch_progress/total/reset", 1),
        (f"{LOOP}/epoch_loop.batch_progress/current/ready", 9),
        (f"{LOOP}/epoch_progress", "x"),
    ],
)
def test_lightnings_counters_are_not_read(original, tmp_path, place, value):
    folder, config, content = original
    ends = []
    for name, changed in (("as it was", content), ("changed", at(content, place, value))):
        own = RunFolder(tmp_path / name)
        shutil.copytree(folder.path, own.path)
        write(own.step_checkpoint(4), changed)
        run(config, own, own.step_checkpoint(4), Call(named=True))
        ends.append(read_checkpoint(own.step_checkpoint(5)))
    assert all(torch.equal(ends[0]["state_dict"][name], tensor) for name, tensor in ends[1]["state_dict"].items())
    assert ends[0]["loops"]["fit_loop"] == ends[1]["loops"]["fit_loop"]


def test_a_state_that_was_not_sharded_is_refused_where_lightning_would_misread_it(original, tmp_path):
    """Its parameters are numbered group by group; under FSDP2 Lightning reads numbers in the order of the model."""
    _, config, content = original
    path = tmp_path / "step-00000004.ckpt"
    write(path, content)
    sharded = config.model_copy(update={"trainer": config.trainer.model_copy(update={"strategy": "fsdp2"})})
    with pytest.raises(UserError, match="fsdp2"):
        Resumed.read(path, sharded)
