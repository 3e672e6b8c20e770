import os
import pickle
import subprocess
import sys
from functools import lru_cache

import numpy as np
import pytest
from streams import EOS, raw_stream, some_documents, token_file

from hybridlm.data.files import stream as stream_module
from hybridlm.data.files.stream import Piece, TokenStream, joined

SIZES = (7, 1, 2, 30, 3, 11)
WHOLE = np.arange(sum(SIZES))
LEARNED = WHOLE % 3 > 0


def cut(values):
    return np.split(values, np.cumsum(SIZES)[:-1])


@pytest.fixture
def pieces(tmp_path):
    return raw_stream(tmp_path / "files", cut(WHOLE), cut(LEARNED))


def test_pieces_read_as_one_array_from_anywhere(pieces):
    assert len(pieces) == len(WHOLE)
    for length in (1, 2, 5, 12, len(WHOLE)):
        firsts = np.arange(len(WHOLE) - length + 1)[::-1]
        found, learned = pieces.windows(firsts, length), pieces.learned_windows(firsts, length)
        assert found.dtype == np.int64
        assert found.tolist() == [WHOLE[a : a + length].tolist() for a in firsts]
        assert learned.tolist() == [LEARNED[a : a + length].tolist() for a in firsts]
    assert pieces.read_learned(6, 4).tolist() == LEARNED[6:10].tolist()  # of four pieces


def test_a_window_over_three_pieces(pieces):
    assert pieces.read(5, 6).tolist() == [5, 6, 7, 8, 9, 10]  # two of the first, one, two, one of the fourth


@pytest.mark.parametrize(("first", "count"), [(-1, 2), (0, 55), (54, 1), (53, 2)])
def test_reading_out_of_range_is_refused(pieces, first, count):
    with pytest.raises(IndexError, match="stream of 54"):
        pieces.read(first, count)


def test_without_a_mask_all_is_learned(tmp_path):
    stream = raw_stream(tmp_path, cut(WHOLE))
    assert not stream.masked
    assert stream.read_learned(2, 9).tolist() == [True] * 9


def test_a_piece_is_a_stretch_of_its_file(tmp_path):
    np.arange(100, dtype="<u4").tofile(tmp_path / "a.bin")
    stream = TokenStream(
        [Piece(tmp_path / "a.bin", "<u4", 10, offset=4 * 80), Piece(tmp_path / "a.bin", "<u4", 5, offset=4)]
    )
    assert stream.read(0, 15).tolist() == [*range(80, 90), *range(1, 6)]


def test_files_of_ours_are_one_stream_with_one_eos_between_documents(tmp_path):
    documents = some_documents(9, seed=1)
    masks = [[number % 2 == 0] * len(ids) for number, ids in enumerate(documents)]
    files = [
        token_file(tmp_path / f"{k}.bin", documents[3 * k : 3 * k + 3], masks[3 * k : 3 * k + 3]) for k in range(3)
    ]
    stream = TokenStream(joined(files))
    wanted = [token for ids in documents for token in (EOS, *ids)] + [EOS]
    learned = [flag for mask in masks for flag in (False, *mask)] + [False]
    assert stream.read(0, len(stream)).tolist() == wanted
    assert stream.read_learned(0, len(stream)).tolist() == learned
    for piece in stream.pieces:  # the index goes with the file, closing eos included
        starts = piece.starts()
        assert starts is not None
        assert piece.tokens()[starts].tolist() == [EOS] * 4
        assert starts[-1] == piece.count - 1
    assert [piece.count - piece.size for piece in stream.pieces] == [1, 1, 0]
    assert len({piece.key for piece in stream.pieces}) == 3


def test_no_files_and_partial_masks_are_refused(tmp_path):
    for pieces in ([], [Piece(tmp_path, "<u2", 3), Piece(tmp_path, "<u2", 3, masked=True)]):
        with pytest.raises(ValueError, match="at least one piece"):
            TokenStream(pieces)
    with pytest.raises(ValueError, match="at least one piece"):
        TokenStream(joined([]))


def test_another_process_reopens_the_files(tmp_path):
    ids = np.arange(5_000_000, dtype="<u2")  # 10 MB
    stream = raw_stream(tmp_path / "files", [ids])
    stream.read(0, 10)
    (tmp_path / "stream").write_bytes(data := pickle.dumps(stream))
    assert len(data) < 10_000
    code = f"import pickle; print(pickle.load(open({str(tmp_path / 'stream')!r}, 'rb')).read(4_000_000, 5).tolist())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(ids[4_000_000:4_000_005].tolist())


def test_no_more_files_are_open_than_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(stream_module, "_opened", lru_cache(maxsize=5)(stream_module._opened.__wrapped__))
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else None
    stream = raw_stream(tmp_path / "files", np.arange(400).reshape(40, 10))
    assert stream.windows(np.arange(0, 390), 10).tolist() == [list(range(a, a + 10)) for a in range(390)]
    assert stream_module._opened.cache_info().currsize == 5
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) <= before + 5


def test_a_stream_made_after_a_file_was_replaced_reads_the_new_one(tmp_path):
    assert raw_stream(tmp_path, [range(9)]).read(3, 2).tolist() == [3, 4]
    assert raw_stream(tmp_path, [range(50, 70)]).read(3, 2).tolist() == [53, 54]
