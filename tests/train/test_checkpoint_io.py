"""Checkpoint files: the old one or the new one, never half of one."""

import hashlib
import io
import os
import pickle
import signal

import pytest
import torch

from hybridlm.errors import UserError
from hybridlm.files.checksum import closing_line
from hybridlm.runs.checkpoint import FORMAT_VERSION, read_checkpoint
from hybridlm.train import checkpoints
from hybridlm.train.checkpoints import AtomicCheckpointIO

FACTS = {"format_version": FORMAT_VERSION, "model": {}, "vocab_size": 4, "tokenizer": "", "accumulate": 1}
CONTENT = {"global_step": 3, "hybridlm": FACTS, "state_dict": {"model.x": torch.arange(4)}}


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "deep" / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint(CONTENT, path)
    assert torch.equal(read_checkpoint(path)["state_dict"]["model.x"], torch.arange(4))
    assert os.listdir(path.parent) == ["a.ckpt"]


@pytest.mark.parametrize("room", [0, 10_000, 41_000])  # at the first byte, within a tensor, before the checksum
def test_a_failed_write_leaves_the_old_file_and_no_partial_one(tmp_path, room):
    resource = pytest.importorskip("resource")
    path = tmp_path / "a.ckpt"
    writer = AtomicCheckpointIO()
    writer.save_checkpoint(CONTENT, path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        writer.save_checkpoint({**CONTENT, "global_step": 4, "large": torch.zeros(9999)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert writer.error == "File too large"
    assert read_checkpoint(path)["global_step"] == 3
    assert os.listdir(tmp_path) == ["a.ckpt"]


def test_ctrl_c_during_a_write_leaves_the_old_file_and_no_partial_one(tmp_path, monkeypatch):
    """torch.save, which calls the file from C++, would turn it into an error about the position in the archive."""

    class Interrupted(io.FileIO):
        def write(self, data):
            if self.tell() > 1000:
                signal.raise_signal(signal.SIGINT)
            return super().write(data)

    path = tmp_path / "a.ckpt"
    writer = AtomicCheckpointIO()
    writer.save_checkpoint(CONTENT, path)
    monkeypatch.setattr(checkpoints, "open", lambda name, mode: Interrupted(name, mode), raising=False)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            writer.save_checkpoint({**CONTENT, "global_step": 4, "large": torch.zeros(9999)}, path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert read_checkpoint(path)["global_step"] == 3
    assert os.listdir(tmp_path) == ["a.ckpt"]


class Payload:
    def __reduce__(self):
        return (os.system, ("touch pwned",))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({**CONTENT, "extra": Payload()}, "could run code"),
        ({"global_step": 3, "state_dict": {}}, "no 'hybridlm' entry"),
        ({**CONTENT, "hybridlm": {"format_version": 99}}, "format version 99"),
    ],
)
def test_what_is_not_ours_is_refused_in_one_line(tmp_path, content, says, monkeypatch):
    """Even with a right checksum."""
    monkeypatch.chdir(tmp_path)
    archive = io.BytesIO()
    torch.save(content, archive)
    raw = archive.getvalue()
    (tmp_path / "a.ckpt").write_bytes(raw + closing_line(hashlib.sha256(raw).hexdigest()))
    with pytest.raises(UserError, match=says) as caught:
        read_checkpoint(tmp_path / "a.ckpt")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("raw", [b"", b"not a checkpoint", pickle.dumps(Payload())])
def test_other_files_are_refused_in_one_line(tmp_path, raw, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.ckpt").write_bytes(raw)
    with pytest.raises(UserError) as caught:
        read_checkpoint(tmp_path / "a.ckpt")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pwned").exists()
