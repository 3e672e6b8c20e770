import json

import numpy as np
import pytest

from hybridlm.config.section import ConfigError
from hybridlm.data.bins import open_bin, write_bin


def write(path, documents=((1, 2, 3), (), (4,)), vocab_size=100, **changes):
    arrays = [np.array(ids, dtype=np.uint32) for ids in documents]
    return write_bin(path, arrays, eos_id=0, vocab_size=vocab_size, tokenizer="f" * 64, text_bytes=9, **changes)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65535, "<u2"), (65536, "<u4"), (200_000, "<u4")])
def test_documents_stand_between_separators(tmp_path, vocab_size, dtype):
    largest = vocab_size - 1
    meta = write(tmp_path / "a.bin", [(1, 2, 3), (), (largest,)], vocab_size, gzip_bytes=5, xz_bytes=4)
    file = open_bin(tmp_path / "a.bin")
    assert file.tokens.tolist() == [0, 1, 2, 3, 0, 0, largest, 0]
    assert file.tokens.dtype == dtype
    assert isinstance(file.tokens, np.memmap)
    assert file.meta == meta
    assert (meta.count, meta.documents, meta.dtype, meta.gzip_bytes, meta.xz_bytes) == (8, 3, dtype, 5, 4)


def test_an_id_outside_the_vocabulary_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="document 1 holds an id outside the vocabulary of 100"):
        write(tmp_path / "a.bin", [(1,), (100,)])
    with pytest.raises(ConfigError, match="no readable sidecar"):
        open_bin(tmp_path / "a.bin")


def change_meta(path, **changes):
    sidecar = path.with_suffix(".json")
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), **changes}))


def flip(path):
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-2]), "has 14 bytes where 16 are recorded"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"\0\0"), "has 18 bytes where 16"),
    "empty": (lambda path: path.write_bytes(b""), "has 0 bytes"),
    "flipped": (flip, "SHA-256"),
    "missing": (lambda path: path.unlink(), "cannot be read"),
    "dtype": (lambda path: change_meta(path, dtype="<u4"), "where 32 are recorded"),
    "odd_dtype": (lambda path: change_meta(path, dtype="<f4"), "sidecar .* is damaged: dtype"),
    "count": (lambda path: change_meta(path, count=6), "where 12 are recorded"),
    "text_count": (lambda path: change_meta(path, count="7"), "sidecar .* is damaged: count"),
    "format": (lambda path: change_meta(path, format_version=2), "has format 2, this version reads 1"),
    "no_sidecar": (lambda path: path.with_suffix(".json").unlink(), "no readable sidecar a.json"),
    "half_sidecar": (lambda path: path.with_suffix(".json").write_text('{"count": 3'), "sidecar .* is damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_in_one_line(tmp_path, name):
    path = tmp_path / "a.bin"
    write(path)
    open_bin(path)
    damage, message = DAMAGE[name]
    damage(path)
    with pytest.raises(ConfigError, match=message) as caught:
        open_bin(path)
    assert len(str(caught.value).splitlines()) == 1
