import numpy as np
import pytest
from streams import raw_stream

from hybridlm.data.windows.window_sources import BLOCK, CutWindows, Mixture, shares
from hybridlm.errors import UserError

WEIGHTS = [3.0, 1.0, 0.5]
SIZES = [900, 300, 50]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Each token names its part and its place."""
    folder = tmp_path_factory.mktemp("mixture")
    return [
        CutWindows(raw_stream(folder / str(k), [np.arange(size) + 1000 * k]), 8, seed=k) for k, size in enumerate(SIZES)
    ]


@pytest.fixture(scope="module")
def mixture(parts):
    return Mixture(parts, WEIGHTS, seed=7)


@pytest.mark.parametrize(
    ("weights", "places"),
    [
        ([1], [BLOCK]),
        ([1, 1], [2048, 2048]),
        ([3, 1], [3072, 1024]),
        ([1, 1, 1], [1366, 1365, 1365]),
        ([0.7, 0.2, 0.1], [2867, 819, 410]),
        ([1, 1e-9], [4095, 1]),
        ([1, 1, 1e-9, 1e-9], [2047, 2047, 1, 1]),
        ([1] * BLOCK, [1] * BLOCK),
    ],
)
def test_shares_are_the_rounded_weights_and_at_least_one(weights, places):
    assert shares(weights).tolist() == places


def test_more_parts_than_places_are_refused():
    with pytest.raises(UserError, match=r"data\.parts: 4097 parts"):
        shares([1.0] * (BLOCK + 1))


def test_every_block_holds_each_part_as_often_as_its_share(mixture):
    for block in (0, 1, 17, 10**9):
        which, _ = mixture.deal(np.arange(block * BLOCK, (block + 1) * BLOCK))
        assert np.bincount(which).tolist() == shares(WEIGHTS).tolist() == [2731, 910, 455]
        early, late = np.bincount(which[: BLOCK // 2]), np.bincount(which[BLOCK // 2 :])
        assert abs(early - late).max() < 200  # mixed, not one part after the other


def test_a_parts_own_sequence_is_unbroken(mixture):
    which, index = mixture.deal(np.arange(3 * BLOCK))
    for k in range(3):
        mine = index[which == k]
        assert mine.tolist() == list(range(len(mine)))


def test_the_windows_are_those_of_the_parts_at_these_places(mixture, parts):
    positions = np.arange(2000, 2000 + BLOCK)
    which, index = mixture.deal(positions)
    ids = mixture.rows(mixture.choose(positions)).ids
    assert (ids[:, 0] // 1000 == which).all()
    for k, part in enumerate(parts):
        mine = which == k
        assert np.array_equal(ids[mine], part.rows(part.choose(index[mine])).ids)
    assert mixture.targets(mixture.choose(positions)).tolist() == [8] * BLOCK


def test_the_order_depends_only_on_seed_and_position(mixture, parts):
    positions = np.arange(BLOCK - 300, BLOCK + 300)
    whole = mixture.choose(positions).tolist()
    again = Mixture(parts, WEIGHTS, seed=7)
    assert [int(again.choose(positions[k : k + 1])[0]) for k in range(0, 600, 37)] == whole[::37]
    assert again.choose(positions[::-1]).tolist() == whole[::-1]
    assert Mixture(parts, WEIGHTS, seed=8).choose(positions).tolist() != whole
    far = np.arange(10**12, 10**12 + 8)
    assert mixture.choose(far).tolist() == again.choose(far).tolist()
    # Written down once: another order would break the exact resume of existing checkpoints.
    assert mixture.rows(mixture.choose(np.arange(6))).ids[:, 0].tolist() == [1241, 1049, 1153, 1161, 324, 628]


def test_a_pass_is_as_many_windows_as_the_parts_have(mixture, parts):
    assert mixture.windows == sum(part.windows for part in parts)
