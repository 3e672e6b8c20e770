from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import efficiency, window_of

from hybridlm.data.windows import packing
from hybridlm.data.windows.order import IGNORE
from hybridlm.data.windows.packing import document_starts, pack


@st.composite
def streams(draw):
    """Starts of documents with many lengths at the borders, and a window's length."""
    seq_len = draw(st.integers(1, 12))
    edges = st.sampled_from([1, seq_len, seq_len + 1, 2 * seq_len, 3 * seq_len + 1])
    lengths = draw(st.lists(st.integers(1, 3 * seq_len) | edges, min_size=1, max_size=60))
    return starts_of(lengths, draw(st.integers(0, 5))), seq_len


def starts_of(lengths, first=0):
    return first + np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def grouped(packed):
    """The windows as lists of pieces."""
    return [[tuple(piece) for piece in packed.pieces[a:b].tolist()] for a, b in pairwise(packed.windows)]


def slow_pack(starts, seq_len):
    """Best-fit decreasing, said once more: one piece after the other against every window."""
    pieces = []
    for first, end in pairwise(starts.tolist()):
        while first < end:
            pieces.append((first, min(seq_len, end - first)))
            first += seq_len
    windows = []
    for piece in sorted(pieces, key=lambda piece: (-piece[1], piece[0])):
        rooms = [seq_len - sum(pairs for _, pairs in window) for window in windows]
        fitting = [(room, at) for at, room in enumerate(rooms) if room >= piece[1]]
        if fitting:
            windows[min(fitting)[1]].append(piece)
        else:
            windows.append([piece])
    return sorted(sorted(window) for window in windows)


def realistic(documents, seed=0):
    lengths = np.random.default_rng(seed).lognormal(6.0, 1.2, documents).astype(np.int64) + 1
    return starts_of(lengths)


@settings(deadline=None)
@given(streams())
def test_every_pair_of_the_stream_comes_exactly_once(stream):
    starts, seq_len = stream
    packed = pack(starts, seq_len)
    seen = []
    for w in range(len(packed)):
        ids, targets, doc_ids = window_of(packed, np.arange(starts[-1] + 1), w)  # a token's id is its place
        counted = doc_ids >= 0
        assert (np.diff(counted.astype(int)) <= 0).all()  # filling columns stand at the right
        assert (targets[counted] == ids[counted] + 1).all()
        seen += ids[counted].tolist()
    assert sorted(seen) == list(range(starts[0], starts[-1]))


@settings(deadline=None)
@given(streams())
def test_no_window_overflows_and_nothing_that_fits_is_cut(stream):
    starts, seq_len = stream
    packed = pack(starts, seq_len)
    assert all(0 < sum(pairs for _, pairs in window) <= seq_len for window in grouped(packed))
    pieces = sorted(tuple(piece) for piece in packed.pieces.tolist())
    for first, end in pairwise(starts.tolist()):
        inside = [pairs for place, pairs in pieces if first <= place < end]
        full, rest = divmod(end - first, seq_len)
        assert inside == [seq_len] * full + [rest] * (rest > 0)


@settings(deadline=None)
@given(streams())
def test_the_packing_is_best_fit_decreasing(stream):
    starts, seq_len = stream
    assert grouped(pack(starts, seq_len)) == slow_pack(starts, seq_len)


@pytest.mark.parametrize("seed", range(6))
def test_best_fit_with_many_lengths_and_rooms(seed):
    rng = np.random.default_rng(seed)
    seq_len = (16, 50, 200)[seed % 3]
    starts = starts_of(rng.integers(1, seq_len // (1 + seed % 2) + 1, 250))
    assert grouped(pack(starts, seq_len)) == slow_pack(starts, seq_len)


def test_the_least_room_is_taken_and_filled():
    # By hand: 7 opens a window (room 3), 6 another (room 4), 4 fits the second alone, 3 the first, and the ones open a
    # third.
    packed = pack(starts_of([1, 3, 6, 1, 7, 4, 1]), 10)
    assert grouped(packed) == [[(0, 1), (10, 1), (22, 1)], [(1, 3), (11, 7)], [(4, 6), (18, 4)]]
    assert efficiency(packed) == 23 / 30


@settings(deadline=None)
@given(streams(), st.integers(0, 2**32 - 1))
def test_ids_targets_and_documents_are_those_of_the_texts(stream, seed):
    starts, seq_len = stream
    rng, eos = np.random.default_rng(seed), 99
    tokens = np.full(starts[-1] + 1, eos, dtype=np.uint16)
    inner = np.setdiff1d(np.arange(starts[-1]), starts)
    tokens[inner] = rng.integers(0, 90, inner.size)
    packed, pairs_of = pack(starts, seq_len), {}  # first token -> inputs and targets of the piece, from whole texts
    for first, end in pairwise(starts.tolist()):
        text = tokens[first + 1 : end].tolist()
        inputs, targets = [eos, *text], [*text, eos]
        for cut in range(0, len(inputs), seq_len):
            pairs_of[first + cut] = inputs[cut : cut + seq_len], targets[cut : cut + seq_len]
    for w, window in enumerate(grouped(packed)):
        parts = [(*pairs_of[first], number) for number, (first, _) in enumerate(window)]
        want_ids = [token for inputs, _, _ in parts for token in inputs]
        want_targets = [token for _, targets, _ in parts for token in targets]
        want_documents = [number for inputs, _, number in parts for _ in inputs]
        filling = seq_len - len(want_ids)
        ids, targets, doc_ids = window_of(packed, tokens, w)
        assert ids.dtype == targets.dtype == doc_ids.dtype == np.int64
        assert ids.tolist() == want_ids + [0] * filling
        assert targets.tolist() == want_targets + [IGNORE] * filling
        assert doc_ids.tolist() == want_documents + [-1] * filling
        assert packed.targets[np.array([w])].sum() == len(want_ids)


def test_targets_are_counted_per_window_asked_for():
    packed = pack(starts_of([1, 3, 6, 1, 7, 4, 1]), 10)
    assert packed.targets[np.array([0, 1, 2])].sum() == 23
    assert packed.targets[np.array([[0, 0], [2, 0]])].sum() == 3 + 3 + 10 + 3
    assert packed.targets[np.array([], dtype=np.int64)].sum() == 0


def test_pieces_and_windows_are_in_stream_order():
    packed = pack(realistic(2000), 1024)
    windows = grouped(packed)
    assert all(window == sorted(window) for window in windows)
    assert windows == sorted(windows)


def test_realistic_lengths_leave_almost_no_padding():
    assert efficiency(pack(realistic(20_000), 2048)) > 0.999


def test_many_documents_are_packed_without_loss():
    starts = realistic(200_000)
    packed = pack(starts, 2048)
    assert packed.targets[np.arange(len(packed))].sum() == starts[-1]
    assert efficiency(packed) > 0.999


def test_the_same_starts_give_the_same_packing():
    starts = realistic(3000)
    first, second = pack(starts, 512), pack(starts.astype(np.uint32), 512)
    assert (first.pieces == second.pieces).all()
    assert (first.windows == second.windows).all()
    assert first.pieces.dtype == first.windows.dtype == np.int64


@pytest.mark.parametrize(
    ("lengths", "seq_len", "count"), [([1], 8, 1), ([8], 8, 1), ([9], 8, 2), ([1, 1, 1], 1, 3), ([3], 1, 3)]
)
def test_the_smallest_streams(lengths, seq_len, count):
    packed = pack(starts_of(lengths), seq_len)
    assert len(packed) == count
    assert efficiency(packed) == sum(lengths) / (count * seq_len)


def test_what_cannot_be_packed_is_refused():
    assert len(pack(np.array([0]), 8)) == 0
    with pytest.raises(ValueError, match="must increase"):
        pack(np.array([0, 4, 4]), 8)
    with pytest.raises(ValueError, match="seq_len=0"):
        pack(np.array([0, 4]), 0)
    packed = pack(np.array([0, 4]), 8)
    for w in (-1, 1):
        with pytest.raises(IndexError):
            window_of(packed, np.arange(5), w)


@settings(deadline=None)
@given(streams(), st.integers(0, 2**32 - 1))
def test_with_a_mask_only_what_is_learned_counts(stream, seed):
    starts, seq_len = stream
    tokens = np.arange(starts[-1] + 1, dtype=np.uint16)
    learned = np.random.default_rng(seed).random(tokens.size) < 0.5
    packed = pack(starts, seq_len)
    counting, counted = packed.counting(learned), []
    for w in range(len(packed)):
        ids, targets, doc_ids = rows = np.empty((3, seq_len), dtype=np.int64)
        counting.fill(tokens, learned, w, rows)
        plain_ids, plain, plain_docs = window_of(packed, tokens, w)
        assert (ids == plain_ids).all()
        assert (doc_ids == plain_docs).all()
        assert targets.tolist() == [t if t != IGNORE and learned[t] else IGNORE for t in plain.tolist()]
        assert counting.targets[np.array([w])].sum() == (targets != IGNORE).sum()
        counted += targets[targets != IGNORE].tolist()
    assert sorted(counted) == [place for place in range(starts[0] + 1, starts[-1] + 1) if learned[place]]
    assert efficiency(counting) == efficiency(packed)


@pytest.mark.parametrize("first", [True, False], ids=["opened", "not_opened"])
@pytest.mark.parametrize("last", [True, False], ids=["closed", "not_closed"])
@pytest.mark.parametrize("block", [1, 5, 1000])
def test_documents_are_found_by_the_eos_between_them(first, last, block, monkeypatch):
    monkeypatch.setattr(packing, "_BLOCK", block)
    tokens = np.array([9, 1, 9, 2, 2, 2, 9, 3, 9], dtype=np.uint16)[0 if first else 1 : None if last else -1]
    starts = document_starts(tokens, 9)
    assert starts.dtype == np.int64
    between = (np.flatnonzero(tokens == 9)).tolist()
    assert starts.tolist() == sorted({0, *between, len(tokens) - 1})


@pytest.mark.parametrize("tokens", [[], [9], [1]])
def test_a_single_token_is_not_a_document(tokens):
    assert len(document_starts(np.array(tokens, dtype=np.uint16), 9)) < 2
