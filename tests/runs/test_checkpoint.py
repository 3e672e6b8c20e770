"""Checkpoints and weights that a stranger made, with a right checksum: refused in a line, or loaded as what they say
they are."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import random
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import VALUES, mutated, refused_or_read, tensors
from safetensors.torch import save_file
from small_models import small_config

from hybridlm.config.load import load_config, to_yaml
from hybridlm.data.tokenizer import byte_tokenizer
from hybridlm.errors import UserError
from hybridlm.files.checksum import closing_line
from hybridlm.files.sealed import digest
from hybridlm.model.build import fresh_model
from hybridlm.runs.checkpoint import EMA_KEY, KEY, PREFIX, facts, load_run, read_checkpoint
from hybridlm.runs.run_folder import RunFolder

CPU = torch.device("cpu")
CONFIG = small_config("M1 T:moe M2 L M3", variants={})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> RunFolder:
    path = tmp_path_factory.mktemp("run")
    (path / "checkpoints").mkdir()
    (path / "config.yaml").write_text(to_yaml(load_config({"model": CONFIG.model_dump()})), encoding="utf-8")
    byte_tokenizer().save(path / "tokenizer.json")
    return RunFolder(path)


@pytest.fixture(scope="module")
def content() -> dict[str, object]:
    tokenizer = byte_tokenizer()
    model = fresh_model(CONFIG, tokenizer.vocab_size, seed=0, device=CPU)
    return {
        "global_step": 3,
        "state_dict": {PREFIX + name: tensor for name, tensor in model.state_dict().items()},
        KEY: facts(CONFIG, tokenizer.vocab_size, tokenizer.fingerprint, 1),
        EMA_KEY: {name: parameter.detach().clone() for name, parameter in model.named_parameters()},
        "loops": {"fit_loop": {"epoch_progress": {"total": {"ready": 1}}}},
        "optimizer_states": [{"state": {0: {"step": torch.ones(())}}, "param_groups": [{"params": [0], "lr": 0.1}]}],
    }


def write(folder: RunFolder, content: object) -> Path:
    """As our own writer does it."""
    archive = io.BytesIO()
    torch.save(content, archive)
    return sealed(folder, archive.getvalue())


def sealed(folder: RunFolder, raw: bytes) -> Path:
    path = folder.step_checkpoint(3)
    path.write_bytes(raw + closing_line(hashlib.sha256(raw).hexdigest()))
    return path


def write_weights(folder: RunFolder, facts: object, weights: dict[str, torch.Tensor]) -> Path:
    text = facts if isinstance(facts, str) else json.dumps(facts)
    weights = {name: tensor.contiguous().clone() for name, tensor in weights.items()}
    save_file(weights, folder.weights, {KEY: text, "sha256": digest(text, weights)})
    return folder.weights


def load(path: Path) -> None:
    """And use it: what was loaded must be able to run."""
    model = load_run(str(path), CPU, ema=path.suffix == ".ckpt").model
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load(path)
    assert len(caught.value.problems) == 1
    return caught.value.problems[0]


def strange(generator: random.Random) -> object:
    return tensors(generator) if generator.random() < 0.3 else copy.deepcopy(generator.choice(VALUES))


def test_both_are_loaded_as_they_are(folder, content):
    load(write(folder, content))
    load(
        write_weights(
            folder, {**content[KEY], "step": 3}, {k.removeprefix(PREFIX): t for k, t in content["state_dict"].items()}
        )
    )


@pytest.mark.parametrize(
    "seed", [pytest.param(range(40), id="40"), pytest.param(range(40, 3000), id="2960", marks=pytest.mark.slow)]
)
def test_a_mutated_checkpoint_is_refused_in_a_line_or_runs(folder, content, seed):
    for number in seed:
        generator = random.Random(number)
        part = generator.choice([KEY, KEY, "state_dict", EMA_KEY, None])
        changed = (
            mutated(content, generator, strange)
            if part is None
            else {**content, part: mutated(content[part], generator, strange)}
        )
        path = write(folder, changed)
        refused_or_read(lambda path=path: load(path))


@pytest.mark.parametrize(
    "seed", [pytest.param(range(40), id="40"), pytest.param(range(40, 2000), id="1960", marks=pytest.mark.slow)]
)
def test_mutated_weights_likewise(folder, content, seed):
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in content["state_dict"].items()}
    for number in seed:
        generator = random.Random(number)
        ours: object = {**content[KEY], "step": 3}
        if generator.random() < 0.7:
            ours = mutated(ours, generator, lambda g: copy.deepcopy(g.choice(VALUES)))
            text = json.dumps(ours)
            ours = text[: generator.randrange(len(text))] if generator.random() < 0.1 else text
        changed = mutated(weights, generator, plain_tensor) if generator.random() < 0.5 else weights
        changed = (
            {name: value for name, value in changed.items() if isinstance(value, torch.Tensor)}
            if isinstance(changed, dict)
            else {}
        )
        path = write_weights(folder, ours, changed)
        refused_or_read(lambda path=path: load(path))


def plain_tensor(generator: random.Random) -> torch.Tensor:
    """One that a safetensors file can hold."""
    shape = [generator.choice([0, 1, 2, 8]) for _ in range(generator.randrange(4))]
    return torch.zeros(
        shape, dtype=generator.choice([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn])
    )


def test_a_size_that_its_tensors_do_not_have_is_refused_before_anything_is_allocated(folder, content):
    leaves = list(whole_numbers(CONFIG.model_dump()))
    assert len(leaves) > 30
    for number, path in enumerate(leaves):
        model = copy.deepcopy(CONFIG.model_dump())
        holder = model
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = (10**9, 2**62)[number % 2]
        file = write(folder, {**content, KEY: {**content[KEY], "model": model}})
        refused_or_read(lambda file=file: load(file))
    for value in (1, 10**9):
        assert (
            "embedding" in refusal(write(folder, {**content, KEY: {**content[KEY], "vocab_size": value}})) or value == 1
        )


def whole_numbers(tree: dict[str, object], path: tuple[str, ...] = ()):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from whole_numbers(value, (*path, key))
        elif (isinstance(value, int) and not isinstance(value, bool)) or value is None:
            yield (*path, key)


class Payload:
    def __reduce__(self):
        return (os.system, ("touch pwned",))


def test_a_checkpoint_never_runs_code(folder, content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    objects = np.array([Payload()], dtype=object)
    for value in (
        Payload(),
        objects,
        {"a": [Payload()]},
        torch.nn.Linear(1, 1),
        print,
        torch.device,
        Path("x"),
        {1, 2},
        b"x",
        1j,
    ):
        assert "refused" in refusal(write(folder, {**content, "extra": value}))
    assert "refused" in refusal(write(folder, {**content, "callbacks": {(1, 2): 3}}))
    weights = {"embedding.weight": torch.zeros(1)}
    for text in (
        '{"format_version": 2, "a": ' + "[" * 10**5,
        "\udcff".encode("utf-8", "replace").decode(),
        "[]",
        "9" * 5000,
    ):
        refused_or_read(lambda text=text: load(write_weights(folder, text, weights)))
    assert os.listdir(tmp_path) == []


def test_an_archive_takes_no_more_memory_than_it_has_bytes(folder, content):
    loop: list[object] = []
    loop.append(loop)
    layers: list[object] = []
    for _ in range(40):
        layers = [layers, layers]
    deep: list[object] = []
    for _ in range(200):
        deep = [deep]
    one = torch.zeros(1000)
    for value, reason in (
        (loop, "levels deep|too often"),
        (layers, "too often"),
        (deep, "levels deep"),
        (torch.zeros(1).expand(10**9), "not plain"),
        ([one.view(1000)[:] for _ in range(2000)], "claim more bytes"),
        (2**70, "64 bits"),
    ):
        assert re.search(reason, refusal(write(folder, {**content, "extra": value})))
    archive = io.BytesIO()
    torch.save({**content, "extra": "0" * 10**7}, archive)
    packed = io.BytesIO()
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    assert "compressed" in refusal(sealed(folder, packed.getvalue()))
    assert "the limit" in refusal(write(folder, {**content, "extra": ["0" * 2**24]}))


def test_only_a_regular_file_is_opened(folder, tmp_path):
    path, weights = folder.step_checkpoint(3), folder.weights
    for file in (path, weights):
        file.unlink(missing_ok=True)
        os.mkfifo(file)
        assert "not a regular file" in refusal(file)
        file.unlink()
        file.symlink_to("/dev/zero")
        assert "not a regular file" in refusal(file)
        file.unlink()
    path.write_bytes(b"")
    assert "no checksum" in refusal(path)
    weights.write_bytes((2**40).to_bytes(8, "little") + b"{}")
    assert "header" in refusal(weights)


def test_damaged_bytes_under_a_right_checksum_are_refused_in_a_line(folder, content):
    raw = write(folder, content).read_bytes()[:-83]
    head = raw.index(b"data.pkl")
    for number in range(60):
        generator = random.Random(number)
        changed = bytearray(raw)
        for _ in range(generator.randint(1, 4)):
            changed[generator.randrange(head, min(len(raw), head + 20_000))] = generator.randrange(256)
        path = sealed(folder, bytes(changed[: generator.choice([len(raw), len(raw) // 2, len(raw) - 30])]))
        refused_or_read(lambda path=path: read_checkpoint(path))
