import json
import os

import numpy as np
import pytest

from hybridlm.data.files.bins import BinWriter, read_meta
from hybridlm.data.files.bins import open_bin as open_known
from hybridlm.errors import UserError


def open_bin(path):
    return open_known(path, read_meta(path))


def write(path, documents=((1, 2, 3), (), (4,)), vocab_size=100, masked=False):
    with BinWriter(path, eos_id=0, vocab_size=vocab_size, tokenizer="f" * 64, masked=masked) as writer:
        for ids in documents:
            writer.add(
                np.array(ids, dtype=np.uint32),
                3,
                np.array([number % 2 == 0 for number in range(len(ids))]) if masked else None,
            )
        return writer.finish()


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65535, "<u2"), (65536, "<u4"), (200_000, "<u4")])
def test_documents_are_between_separators(tmp_path, vocab_size, dtype):
    largest = vocab_size - 1
    meta = write(tmp_path / "a.bin", [(1, 2, 3), (), (largest,)], vocab_size)
    file = open_bin(tmp_path / "a.bin")
    assert file.tokens().tolist() == [0, 1, 2, 3, 0, 0, largest, 0]
    assert file.tokens().dtype == dtype
    assert not file.tokens().flags.writeable
    assert file.starts().tolist() == [0, 4, 5, 7]
    assert file.learned() is None
    assert read_meta(tmp_path / "a.bin") == meta
    assert (meta.count, meta.documents, meta.dtype, meta.text_bytes) == (8, 3, dtype, 9)


def test_the_mask_is_stored_next_to_the_tokens(tmp_path):
    write(tmp_path / "a.bin", masked=True)
    file = open_bin(tmp_path / "a.bin")
    assert file.tokens().tolist() == [0, 1, 2, 3, 0, 0, 4, 0]
    assert file.learned().tolist() == [False, True, False, True, False, False, True, False]


def test_an_id_outside_the_vocabulary_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"document 1 .* outside the vocabulary of 100"):
        write(tmp_path / "a.bin", [(1,), (100,)])
    with pytest.raises(UserError, match="no readable sidecar"):
        open_bin(tmp_path / "a.bin")


def change_meta(path, **changes):
    sidecar = path.with_suffix(".json")
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), **changes}))


def flip(path):
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-2]), "has 14 bytes, but 16 are recorded"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"\0\0"), "has 18 bytes, but 16"),
    "empty": (lambda path: path.write_bytes(b""), "has 0 bytes"),
    "flipped": (flip, "SHA-256"),
    "missing": (lambda path: path.unlink(), "cannot be read"),
    "dtype": (lambda path: change_meta(path, dtype="<u4"), "but 32 are recorded"),
    "odd_dtype": (lambda path: change_meta(path, dtype="<f4"), "sidecar .* is damaged .*: dtype"),
    "count": (lambda path: change_meta(path, count=6), "but 12 are recorded"),
    "text_count": (lambda path: change_meta(path, count="7"), "sidecar .* is damaged .*: count"),
    "format": (
        lambda path: change_meta(path, format_version=1),
        "of another version .*: format_version = 1",
    ),
    "no_sidecar": (lambda path: path.with_suffix(".json").unlink(), "no readable sidecar a.json"),
    "other_format": (
        lambda path: path.with_suffix(".json").write_text('{"format_version": 1}'),
        "of another version .*: format_version = 1",
    ),
    "index_cut": (lambda path: path.with_suffix(".idx").write_bytes(b""), r"a\.idx has 0 bytes, but 16 are recorded"),
    "index_flipped": (lambda path: flip(path.with_suffix(".idx")), r"a\.idx is damaged"),
    "mask_missing": (lambda path: path.with_suffix(".mask").unlink(), r"a\.mask cannot be read"),
    "mask_flipped": (lambda path: flip(path.with_suffix(".mask")), r"a\.mask is damaged"),
    "documents": (lambda path: change_meta(path, documents=9), "counts or the files it names are impossible"),
    "files": (lambda path: change_meta(path, sha256={".bin": "f"}), "counts or the files it names are impossible"),
    "half_sidecar": (lambda path: path.with_suffix(".json").write_text('{"count": 3'), "no readable sidecar a.json"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_in_one_line(tmp_path, name):
    path = tmp_path / "a.bin"
    write(path, masked=True)
    open_bin(path)
    damage, message = DAMAGE[name]
    damage(path)
    with pytest.raises(UserError, match=message) as caught:
        open_bin(path)
    assert len(str(caught.value).splitlines()) == 1


def test_any_cut_and_any_flip_of_a_sidecar_is_refused_in_one_line_or_changes_nothing_that_is_read(tmp_path):
    path = tmp_path / "a.bin"
    meta = write(path, masked=True)
    sidecar = path.with_suffix(".json")
    content = sidecar.read_bytes()
    refused = 0
    for place in range(len(content)):
        for damaged in (
            content[:place],
            *(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :] for bit in (1, 32, 128)),
        ):
            sidecar.write_bytes(damaged)
            line = ""
            try:
                open_bin(path)
                read = read_meta(path)
            except UserError as error:
                line = str(error)
            if line:
                assert len(line.splitlines()) == 1
                refused += 1
            else:  # the tokenizer's fingerprint is compared by who knows it, blanks mean nothing
                assert read.model_copy(update={"tokenizer": "", "vocab_size": 0, "text_bytes": 0}) == meta.model_copy(
                    update={"tokenizer": "", "vocab_size": 0, "text_bytes": 0}
                )
    assert refused > 3 * len(content)


@pytest.mark.parametrize("kind", ["pipe", "zeros", "deep", "latin"])
def test_an_untrusted_sidecar_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "a.bin"
    path.write_bytes(b"\0" * 64)
    sidecar = path.with_suffix(".json")
    if kind == "pipe":
        os.mkfifo(sidecar)
    elif kind == "zeros":
        sidecar.symlink_to("/dev/zero")
    else:
        sidecar.write_bytes(b"[" * 10**6 if kind == "deep" else b'{"a": "\xe9"}')
    with pytest.raises(UserError) as caught:
        open_bin(path)
    assert "\n" not in str(caught.value)
