"""Untrusted archives of torch.save: plain values and whole tensors are read, everything else is refused unread."""

from __future__ import annotations

import os
import zipfile

import pytest
import torch

from hybridlm.files.archive import read_archive
from hybridlm.files.plain import MAX_DEPTH, Unreadable


class Payload:
    def __reduce__(self):
        return (os.system, ("touch pwned",))


def nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


def test_plain_values_and_tensors_are_read(tmp_path):
    content = {"a": torch.arange(4), "b": [1, 2.5, None, True, "x"], 3: (torch.ones(2, 2),), "c": nested(MAX_DEPTH - 2)}
    torch.save(content, tmp_path / "a")
    found = read_archive(tmp_path / "a")
    assert torch.equal(found["a"], content["a"])
    assert (found["b"], found["c"], found[3][0].shape) == (content["b"], content["c"], (2, 2))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (Payload(), "could run code"),
        ({"x": nested(MAX_DEPTH + 1)}, "levels deep"),
        ({(1, 2): 3}, "a key"),
        ({"x": {1, 2}}, "contains a set"),
        ({"x": 2**64}, "64 bits"),
        ({"x": torch.ones(1).expand(9)}, "expanded"),
        ({"x": torch.ones(3, device="meta")}, "refused"),
        ({"x": torch.ones(3).to_sparse()}, "sparse"),
    ],
)
def test_anything_else_is_refused(tmp_path, monkeypatch, content, reason):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "a")
    with pytest.raises(Unreadable, match=reason):
        read_archive(tmp_path / "a")
    assert not (tmp_path / "pwned").exists()


def test_compressed_and_other_files_are_refused(tmp_path):
    torch.save({"x": torch.zeros(1000)}, tmp_path / "a")
    with zipfile.ZipFile(tmp_path / "a") as plain, zipfile.ZipFile(tmp_path / "b", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(Unreadable, match="compressed"):
        read_archive(tmp_path / "b")
    (tmp_path / "c").write_bytes(b"nothing of the kind")
    with pytest.raises(Unreadable, match="archive"):
        read_archive(tmp_path / "c")
