"""Training on token files of other programs, and documents packed out of them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hybridlm.config.data import DataConfig, TokenizerConfig
from hybridlm.config.section import ConfigError
from hybridlm.data.corpus import document_starts, packed_documents
from hybridlm.data.prepare import prepare
from hybridlm.data.tokenizer import byte_tokenizer

EOS = 256
TEXTS = [b"one", b"", b"a longer document", b"four"]
STREAM = np.array([token for text in TEXTS for token in (EOS, *text)], dtype="<u2")


@pytest.fixture
def folder(tmp_path):
    byte_tokenizer().save(tmp_path / "tokenizer.json")
    np.tile(STREAM, 20).tofile(tmp_path / "train.bin")
    STREAM.tofile(tmp_path / "val.bin")
    return tmp_path


def config(folder, **changes):
    values = {"source": "bins", "path": f"{folder}/train.bin", "dtype": "u16", "out": f"{folder}/out", **changes}
    values.setdefault("tokenizer", TokenizerConfig(kind="file", path=f"{folder}/tokenizer.json"))
    return DataConfig(**values)


def test_a_file_beside_another_one(folder):
    lines = []
    prepared = prepare(config(folder, val_path=f"{folder}/val.bin"), lines.append)
    assert np.array_equal(prepared.train.tokens, np.tile(STREAM, 20))
    assert np.array_equal(prepared.val.tokens, STREAM)
    assert prepared.val.meta.text_bytes == len(b"".join(TEXTS))
    assert prepared.val.meta.documents == 4
    assert prepared.train.meta.tokenizer == prepared.tokenizer.fingerprint == byte_tokenizer().fingerprint
    assert f"{len(STREAM)} of val.bin" in lines[0]
    assert not (folder / "out").exists()


def test_the_end_is_held_out_where_there_is_no_other(folder):
    prepared = prepare(config(folder, val_fraction=0.25))
    whole = np.tile(STREAM, 20)
    assert np.array_equal(np.concatenate([prepared.train.tokens, prepared.val.tokens]), whole)
    assert len(prepared.val.tokens) == len(whole) // 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "nowhere.bin"}, r"nowhere\.bin"),
        ({"dtype": None}, r"data\.dtype"),
        ({"tokenizer": TokenizerConfig(kind="file", path="nowhere.json")}, r"nowhere\.json"),
        ({"val_path": "nowhere.bin"}, r"nowhere\.bin"),
    ],
)
def test_what_is_missing_is_named_in_one_line(folder, changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        prepare(config(folder, **changes))
    assert len(str(caught.value).splitlines()) == 1


def test_ids_beyond_the_tokenizer_are_found_before_training(folder):
    ids = np.tile(STREAM, 20)
    ids[300] = 257
    ids.tofile(folder / "train.bin")
    with pytest.raises(ConfigError, match=r"257.*300"):
        prepare(config(folder))


def test_texts_are_tokenised_with_a_given_tokenizer(folder):
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"text {i}")
    values = {"source": "files", "path": f"{folder}/*.txt", "out": f"{folder}/out", "val_fraction": 0.3}
    given = prepare(DataConfig(**values, tokenizer=TokenizerConfig(kind="file", path=f"{folder}/tokenizer.json")))
    made = prepare(DataConfig(**values, tokenizer=TokenizerConfig(kind="bytes")))
    assert given.folder != made.folder
    assert np.array_equal(given.train.tokens, made.train.tokens)


def test_a_tokenizer_that_normalises_counts_the_bytes_that_it_gives_back(folder):
    """Document by document: a mark at the beginning of one is not joined to the letter at the end of the one before."""
    facts = json.loads((folder / "tokenizer.json").read_text())
    (folder / "nfc.json").write_text(json.dumps({**facts, "normalizer": {"type": "NFC"}}))
    for i in range(30):
        (folder / f"{i}.txt").write_text("\u0301 e\u0301 e", encoding="utf-8")
    lines = []
    values = {"source": "files", "path": f"{folder}/*.txt", "out": f"{folder}/out", "val_fraction": 0.3}
    prepared = prepare(DataConfig(**values, tokenizer=TokenizerConfig(kind="file", path=f"{folder}/nfc.json")), lines.append)
    for file in (prepared.train, prepared.val):
        assert file.meta.text_bytes == prepared.tokenizer.token_bytes()[file.tokens].sum() == 7 * file.meta.documents
    assert any("NFC" in line for line in lines)


@pytest.mark.parametrize("first", [True, False], ids=["opened", "not_opened"])
@pytest.mark.parametrize("last", [True, False], ids=["closed", "not_closed"])
def test_where_documents_start(first, last):
    tokens = np.concatenate([STREAM[0 if first else 1 :], [EOS] if last else []]).astype(np.uint16)
    starts = document_starts(tokens, EOS)
    assert starts[0] == 0
    assert starts[-1] == len(tokens) - 1
    assert bool((np.diff(starts) > 0).all())
    assert len(starts) == 5


def test_a_packing_is_made_once_and_again_where_it_is_damaged_or_cannot_be_kept(folder, monkeypatch):
    prepared = prepare(config(folder))
    first = packed_documents(prepared, 8)
    (path,) = prepared.folder.iterdir()
    before = path.stat().st_mtime_ns
    assert np.array_equal(packed_documents(prepared, 8).pieces, first.pieces)
    assert path.stat().st_mtime_ns == before
    path.write_bytes(path.read_bytes()[:50])
    assert np.array_equal(packed_documents(prepared, 8).pieces, first.pieces)
    path.unlink()
    prepared.folder.rmdir()
    prepared.folder.write_text("a file stands where the folder should")
    assert np.array_equal(packed_documents(prepared, 8).pieces, first.pieces)
