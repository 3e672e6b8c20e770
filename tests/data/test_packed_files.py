import errno
import os
import pickle
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from streams import EOS, prepared, raw_stream, some_documents, split, token_file, window_of
from streams import part as part_of

from hybridlm.data.files.stream import TokenStream, joined
from hybridlm.data.windows import packed_files
from hybridlm.data.windows.order import IGNORE
from hybridlm.data.windows.packed_files import PackedStream
from hybridlm.data.windows.packing import pack
from hybridlm.data.windows.splits import packed_documents
from hybridlm.data.windows.window_sources import PackedWindows
from hybridlm.errors import UserError

SEQ_LEN = 16


@pytest.fixture
def stream(tmp_path):
    return split(tmp_path / "files", some_documents(60, seed=3), files=3).stream


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "packed"


def opened(stream, folder, seq_len=SEQ_LEN):
    return PackedStream(stream, seq_len, eos_id=EOS, folder=folder)


def rows(packed):
    return PackedWindows(packed, 0, isolate=True).rows(np.arange(len(packed)))


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(rows(one)[:3], rows(other)[:3], strict=True))


def refuse(*_, **__):
    raise AssertionError("packed again")


def test_every_piece_is_packed_by_itself_and_no_pair_is_lost(stream, folder):
    packed, wanted = opened(stream, folder), []
    for number, piece in enumerate(stream.pieces):
        alone = pack(piece.starts(), SEQ_LEN)
        assert packed.firsts[number + 1] - packed.firsts[number] == len(alone)
        wanted += [window_of(alone, piece.tokens(), w) for w in range(len(alone))]
    ids, targets, doc_ids = rows(packed)[:3]
    for row, window in enumerate(wanted):
        assert [array[row].tolist() for array in (ids, targets, doc_ids)] == [array.tolist() for array in window]
    tokens = stream.read(0, len(stream)).tolist()
    counted = targets != IGNORE
    assert sorted(zip(ids[counted], targets[counted], strict=True)) == sorted(pairwise(tokens))
    assert packed.efficiency == (len(tokens) - 1) / (len(packed) * SEQ_LEN) == counted.mean()


def test_with_a_mask_only_learned_targets_count(tmp_path, folder):
    documents = some_documents(30, seed=4)
    rng = np.random.default_rng(0)
    masks = [(rng.random(len(ids)) < 0.5).tolist() for ids in documents]
    stream = split(tmp_path / "files", documents, files=2, learned=masks).stream
    packed = opened(stream, folder)
    windows = PackedWindows(packed, 0, isolate=True)
    targets = rows(packed).targets
    wanted = [
        token for ids, mask in zip(documents, masks, strict=True) for token, flag in zip(ids, mask, strict=True) if flag
    ]
    assert sorted(targets[targets != IGNORE].tolist()) == sorted(wanted)
    for chosen in ([0], [3, 3, len(packed) - 1], range(len(packed))):
        assert windows.targets(np.array(chosen)).tolist() == (targets[list(chosen)] != IGNORE).sum(axis=1).tolist()


def test_files_without_an_index_are_searched_for_documents(tmp_path, folder):
    documents = some_documents(8, seed=5)
    ids = [token for text in documents for token in (EOS, *text)] + [EOS]
    found = opened(raw_stream(tmp_path / "raw", [ids]), folder)
    assert same(found, opened(TokenStream(joined([token_file(tmp_path / "ours" / "0.bin", documents)])), folder))


def test_a_packing_is_made_once(stream, folder, monkeypatch):
    first = opened(stream, folder)
    files = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(files) == 3 + 1
    monkeypatch.setattr(packed_files, "pack", refuse)
    assert same(opened(stream, folder), first)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == files


def test_a_packing_that_is_killed_goes_on_where_the_index_was_written(stream, folder, monkeypatch):
    def kill(starts, seq_len):
        if len(packed) == 2:
            raise KeyboardInterrupt
        packed.append(starts)
        return pack(starts, seq_len)

    packed = []
    monkeypatch.setattr(packed_files, "_EVERY", 0)
    monkeypatch.setattr(packed_files, "pack", kill)
    with pytest.raises(KeyboardInterrupt):
        opened(stream, folder)
    packed.pop()
    resumed = opened(stream, folder)
    monkeypatch.setattr(packed_files, "pack", pack)
    assert same(resumed, opened(stream, folder.with_name("whole")))


def test_opening_reads_no_packing(stream, folder, monkeypatch):
    opened(stream, folder)
    mapped = []
    plain = packed_files.Mapped
    monkeypatch.setattr(packed_files, "Mapped", lambda path: mapped.append(path) or plain(path))
    packed = opened(stream, folder)
    assert not mapped
    windows = PackedWindows(packed, 0, isolate=False)
    windows.rows(np.array([0]))
    windows.targets(np.array([0]))
    assert len(set(mapped)) == 1


def test_different_settings_are_packed_separately(stream, folder):
    opened(stream, folder)
    other = opened(stream, folder, seq_len=24)
    assert other.seq_len == 24
    assert rows(other).ids.shape[1] == 24
    pieces = [replace(piece, key=piece.key[::-1]) for piece in stream.pieces]
    opened(TokenStream(pieces), folder)
    assert len(list(folder.glob("*.bin"))) == 9


@pytest.mark.parametrize("name", ["index.json", "a piece"])
def test_a_damaged_packing_is_rebuilt_whatever_byte_is_wrong(tmp_path, name):
    stream = split(tmp_path / "files", some_documents(6, seed=6), files=1).stream
    folder = tmp_path / "packed"
    wanted = rows(opened(stream, folder))
    path = folder / name if name == "index.json" else next(folder.glob("*.bin"))
    whole = path.read_bytes()
    places = [*range(0, len(whole), 11)]
    for size in (0, 1, 100, 511, 512, 513, len(whole) - 1):
        path.unlink()
        path.write_bytes(whole[:size])
        assert np.array_equal(rows(opened(stream, folder)).targets, wanted.targets), size
    for place in places:
        path.unlink()
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        found = rows(opened(stream, folder))
        assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True)), place
        assert path.read_bytes() == whole or name == "index.json", place


def test_packing_works_where_nothing_can_be_written(stream, tmp_path, folder):
    blocked = tmp_path / "blocked"
    blocked.write_text("a file stands where the folder should")
    packed = opened(stream, blocked)
    assert same(packed, opened(stream, folder))
    assert same(pickle.loads(pickle.dumps(packed)), packed)
    assert blocked.read_text().startswith("a file")


def test_a_failed_write_leaves_nothing_behind(stream, folder, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "no space left")

    whole = opened(stream, stream.pieces[0].path.parent / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("hybridlm.files.durable.os.replace", fail)
        packed = opened(stream, folder)
    assert os.listdir(folder) == []
    assert same(packed, whole)


def test_pieces_without_documents_are_skipped(tmp_path, folder):
    files = [token_file(tmp_path / f"{k}.bin", documents) for k, documents in enumerate(([], [[1, 2]], [], [[3]], []))]
    packed = opened(TokenStream(joined(files)), folder)
    assert len(packed) == 2
    assert rows(packed).ids[:, :3].tolist() == [[EOS, 1, 2], [EOS, 3, 0]]
    assert rows(opened(TokenStream(joined(files)), folder)).targets[:, :3].tolist() == [[1, 2, EOS], [3, EOS, IGNORE]]
    with pytest.raises(UserError, match="no document"):
        opened(TokenStream(joined(files[:1])), folder)


def test_how_full_the_windows_of_all_parts_are(tmp_path):
    parts = [part_of(tmp_path, name, train=count, seed=count) for name, count in (("a", 30), ("b", 50))]
    facts = packed_documents(prepared(*parts), SEQ_LEN)
    each = [packed_documents(prepared(part), SEQ_LEN) for part in parts]
    assert facts.windows == sum(one.windows for one in each)
    assert facts.efficiency == pytest.approx(
        sum(len(part.train.stream) - 1 for part in parts) / (facts.windows * SEQ_LEN)
    )
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["train", "train-packed-16", "val"]
