"""Training on token files of other programs, and documents packed out of them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hybridlm.config.data import DataConfig, TokenizerConfig
from hybridlm.data.files.bins import BinWriter, open_bin
from hybridlm.data.files.stream import TokenStream, joined
from hybridlm.data.files.tokenised import _cut
from hybridlm.data.preparing.prepare import prepare
from hybridlm.data.tokenizer import byte_tokenizer
from hybridlm.errors import UserError

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


def tokens_of(split):
    return split.stream.read(0, len(split.stream))


def test_a_file_beside_another_one(folder):
    lines = []
    prepared = prepare(config(folder, val_path=f"{folder}/val.bin"), lines.append)
    (part,) = prepared.parts
    assert np.array_equal(tokens_of(part.train), np.tile(STREAM, 20))
    assert np.array_equal(tokens_of(part.val), STREAM)
    assert part.val.text_bytes == len(b"".join(TEXTS))
    assert part.val.documents == 4
    assert prepared.tokenizer.fingerprint == byte_tokenizer().fingerprint
    assert f"{len(STREAM)} tokens of {folder}/val.bin" in lines[0]


def test_the_end_is_held_out_where_there_is_no_other(folder):
    (part,) = prepare(config(folder, val_fraction=0.25)).parts
    whole = np.tile(STREAM, 20)
    assert np.array_equal(np.concatenate([tokens_of(part.train), tokens_of(part.val)]), whole)
    assert len(part.val.stream) == len(whole) // 4


def test_several_files_are_one_stream_and_the_end_of_all_is_held_out(folder):
    whole = np.tile(STREAM, 20)
    for number, piece in enumerate(np.split(whole, [100, 101, 250])):
        piece.tofile(folder / f"part{number}.bin")
    lines = []
    (part,) = prepare(config(folder, path=f"{folder}/part*.bin", val_fraction=0.7), lines.append).parts
    (one,) = prepare(config(folder, val_fraction=0.7)).parts
    assert "4 files of" in lines[0]
    for mine, reference in ((part.train, one.train), (part.val, one.val)):
        assert np.array_equal(tokens_of(mine), tokens_of(reference))
        assert (mine.documents, mine.text_bytes) == (reference.documents, reference.text_bytes)
    with pytest.raises(UserError, match=r"data\.path=.*none\*\.bin matches no file"):
        prepare(config(folder, path=f"{folder}/none*.bin"))


def write_own(path, texts, masked=False):
    tokenizer = byte_tokenizer()
    with BinWriter(path, eos_id=EOS, vocab_size=257, tokenizer=tokenizer.fingerprint, masked=masked) as writer:
        for text in texts:
            ids = np.array(list(text), dtype=np.uint32)
            writer.add(ids, len(text), ids > ord("m") if masked else None)
        writer.finish()


def test_our_own_files_join_at_an_end_of_text(folder):
    write_own(folder / "own0.bin", TEXTS[:2])
    write_own(folder / "own1.bin", TEXTS[2:])
    write_own(folder / "val.bin", TEXTS[2:])
    (part,) = prepare(config(folder, path=f"{folder}/own*.bin", dtype=None, val_path=f"{folder}/val.bin")).parts
    assert tokens_of(part.train).tolist() == [*STREAM.tolist(), EOS]
    assert (part.train.documents, part.train.text_bytes) == (4, len(b"".join(TEXTS)))
    other = TokenizerConfig(kind="file", path=f"{folder}/tokenizer.json", special_tokens=("<|x|>",))
    with pytest.raises(UserError, match=r"own0\.bin .* data\.tokenizer\.path"):
        prepare(config(folder, path=f"{folder}/own*.bin", dtype=None, tokenizer=other))


def test_what_is_learned_of_our_own_files_is_kept(folder):
    write_own(folder / "own.bin", TEXTS, masked=True)
    write_own(folder / "other.bin", TEXTS, masked=True)
    (part,) = prepare(config(folder, path=f"{folder}/own.bin", dtype=None, val_path=f"{folder}/other.bin")).parts
    assert part.train.stream.masked
    assert part.train.text_bytes == sum(letter > ord("m") for text in TEXTS for letter in text)
    with pytest.raises(UserError, match=r"holds conversations, which are not cut: .* data\.val_path"):
        prepare(config(folder, path=f"{folder}/own.bin", dtype=None, val_fraction=0.4))


def test_a_prepared_corpus_is_read_back_by_its_files(folder):
    for number in range(30):
        (folder / f"{number}.txt").write_text(f"text {number} of some words, of some words")
    values = {"source": "files", "path": f"{folder}/*.txt", "out": f"{folder}/out", "val_fraction": 0.3}
    prepared = prepare(DataConfig(**values, tokenizer=TokenizerConfig(vocab_size=280)))
    made = prepared.parts[0]
    tokenizer = TokenizerConfig(kind="file", path=f"{made.folder}/tokenizer.json")
    paths = {"path": f"{made.folder}/train-*.bin", "val_path": f"{made.folder}/val-*.bin"}
    (read,) = prepare(config(folder, **paths, dtype=None, tokenizer=tokenizer)).parts
    for mine, reference in ((read.train, made.train), (read.val, made.val)):
        assert np.array_equal(tokens_of(mine), tokens_of(reference))
        assert (mine.documents, mine.text_bytes) == (reference.documents, reference.text_bytes)


def test_files_are_scanned_once(folder, monkeypatch):
    settings = config(folder, val_path=f"{folder}/val.bin")
    first = prepare(settings).parts[0]
    monkeypatch.setattr("hybridlm.data.files.foreign_bins._check_raw", lambda *_: pytest.fail("looked through again"))
    monkeypatch.setattr("hybridlm.data.files.tokenised._Scans._counted", lambda *_: pytest.fail("counted again"))
    again = prepare(settings).parts[0]
    assert (again.folder, again.train.text_bytes, again.val.documents) == (
        first.folder,
        first.train.text_bytes,
        first.val.documents,
    )
    ids = np.tile(STREAM, 20)
    ids[300] = 257
    ids.tofile(folder / "train.bin")
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"257.*300"):
        prepare(settings)


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
    with pytest.raises(UserError, match=message) as caught:
        prepare(config(folder, **changes))
    assert len(str(caught.value).splitlines()) == 1


def test_ids_beyond_the_tokenizer_are_found_before_training(folder):
    ids = np.tile(STREAM, 20)
    ids[300] = 257
    ids.tofile(folder / "train.bin")
    with pytest.raises(UserError, match=r"257.*300"):
        prepare(config(folder))


def test_texts_are_tokenised_with_a_given_tokenizer(folder):
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"text {i}")
    values = {"source": "files", "path": f"{folder}/*.txt", "out": f"{folder}/out", "val_fraction": 0.3}
    given = prepare(DataConfig(**values, tokenizer=TokenizerConfig(kind="file", path=f"{folder}/tokenizer.json")))
    made = prepare(DataConfig(**values, tokenizer=TokenizerConfig(kind="bytes")))
    assert np.array_equal(tokens_of(given.parts[0].train), tokens_of(made.parts[0].train))


def test_a_tokenizer_that_normalises_counts_the_bytes_that_it_gives_back(folder):
    """Document by document: a mark at the beginning of one is not joined to the letter at the end of the one before."""
    facts = json.loads((folder / "tokenizer.json").read_text())
    (folder / "nfc.json").write_text(json.dumps({**facts, "normalizer": {"type": "NFC"}}))
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"\u0301 e\u0301 e{i:02}", encoding="utf-8")
    lines = []
    values = {"source": "files", "path": f"{folder}/*.txt", "out": f"{folder}/out", "val_fraction": 0.3}
    prepared = prepare(
        DataConfig(**values, tokenizer=TokenizerConfig(kind="file", path=f"{folder}/nfc.json")), lines.append
    )
    for split in (prepared.parts[0].train, prepared.parts[0].val):
        assert split.text_bytes == prepared.tokenizer.token_bytes()[tokens_of(split)].sum() == 9 * split.documents
    assert any("NFC" in line for line in lines)


def test_a_cut_inside_one_of_our_files_adds_no_token(tmp_path):
    pieces = []
    for name in ("a", "b"):
        with BinWriter(tmp_path / f"{name}.bin", eos_id=256, vocab_size=257, tokenizer="t") as writer:
            writer.add(np.arange(10), 10)
            pieces.append(open_bin(tmp_path / f"{name}.bin", writer.finish()))
    whole = TokenStream(joined(pieces))
    for at in range(1, len(whole)):
        before, after = map(TokenStream, _cut(whole.pieces, at, "data"))
        assert [*before.read(0, at), *after.read(0, len(after))] == whole.read(0, len(whole)).tolist()
