import time

import numpy as np
import pytest
from streams import raw_stream

from hybridlm.data.windows.order import IGNORE, permute, spread, window_count, window_starts
from hybridlm.data.windows.window_sources import SideBySide
from hybridlm.errors import UserError


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 16, 17, 100, 1000, 4097])
def test_permute_is_a_bijection_that_depends_on_its_keys(count):
    orders = []
    for seed in range(3):
        keys = np.random.default_rng(seed).integers(0, 2**63, 6).astype(np.uint64)
        order = permute(np.arange(count), count, keys)
        assert sorted(order.tolist()) == list(range(count))
        orders.append(order.tolist())
    if count >= 16:
        assert orders[0] != orders[1] != orders[2] != list(range(count))


def test_permute_mixes_evenly():
    # Where each of 8 windows lands over 2,000 passes: expected 250 each, standard deviation 15.
    table = np.zeros((8, 8), dtype=int)
    for epoch in range(2000):
        order = window_starts(np.arange(8) + 8 * epoch, n_tokens=9 * 4, seq_len=4, seed=0) // 4
        table[np.arange(8), order] += 1
    assert table.min() > 175
    assert table.max() < 325


def test_permute_costs_the_same_anywhere():
    keys = np.arange(6, dtype=np.uint64)
    began = time.perf_counter()
    values = permute(np.arange(10**12, 10**12 + 4096), 3 * 10**12, keys)
    assert time.perf_counter() - began < 10
    assert len(set(values.tolist())) == 4096
    assert values.max() < 3 * 10**12


@pytest.mark.parametrize(
    ("n_tokens", "seq_len"), [(5, 4), (6, 4), (8, 4), (9, 4), (12, 4), (13, 4), (1000, 7), (1000, 64)]
)
def test_each_pass_cuts_the_text_in_windows_that_come_once(n_tokens, seq_len):
    count, phases = window_count(n_tokens, seq_len), set()
    for epoch in range(60):
        starts = np.sort(window_starts(np.arange(count) + epoch * count, n_tokens=n_tokens, seq_len=seq_len, seed=3))
        assert starts[0] >= 0
        assert starts[-1] + seq_len + 1 <= n_tokens
        assert (np.diff(starts) == seq_len).all()
        # What a pass leaves out is shorter than two windows, and phases change from pass to pass.
        assert n_tokens - 1 - count * seq_len < 2 * seq_len
        phases.add(int(starts[0]))
    assert len(phases) > 1 or n_tokens == seq_len + 1


def test_order_is_a_function_of_seed_and_position_only():
    def starts(positions, seed=1):
        return window_starts(positions, n_tokens=999, seq_len=8, seed=seed).tolist()

    positions = np.arange(700)
    whole = starts(positions)
    assert [starts(positions[k : k + 1])[0] for k in range(0, 700, 13)] == whole[::13]
    assert starts(positions[::-1]) == whole[::-1]
    assert starts(positions, seed=2) != whole
    count = window_count(999, 8)
    assert whole[:count] != whole[count : 2 * count]
    # Written down once: another order would break the exact resume of existing checkpoints.
    assert whole[:6] == [385, 529, 673, 937, 785, 929]


@pytest.mark.parametrize("n_tokens", [2, 3, 8, 9, 10, 100])
def test_validation_windows_cover_every_token_after_the_first_once(tmp_path, n_tokens):
    windows = SideBySide(raw_stream(tmp_path, [np.arange(n_tokens)]), 8)
    rows = windows.rows(np.arange(windows.numbers))
    counted = rows.targets != IGNORE
    assert rows.targets[counted].tolist() == list(range(1, n_tokens))
    assert (rows.ids[counted] + 1).tolist() == rows.targets[counted].tolist()
    assert windows.targets(np.arange(windows.numbers)).tolist() == counted.sum(axis=1).tolist()


def test_a_choice_is_spread_evenly():
    assert spread(np.arange(4), 4, 100).tolist() == [0, 25, 50, 75]
    assert spread(np.arange(3), 3, 100).tolist() == [0, 33, 66]
    assert spread(np.arange(5), 5, 5).tolist() == [0, 1, 2, 3, 4]
    assert spread(np.array([10**6 - 1]), 10**6, 10**12).tolist() == [10**12 - 10**6]


def test_too_little_text_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"8 tokens, .* data.seq_len \+ 1 = 9"):
        window_count(8, 8)
    with pytest.raises(UserError, match="1 tokens"):
        SideBySide(raw_stream(tmp_path, [[1]]), 8)
