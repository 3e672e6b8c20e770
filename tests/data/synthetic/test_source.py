"""Generated windows through the loaders: a step's data hang on the seed and the step alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from hybridlm.config.data import DataConfig
from hybridlm.config.synthetic import SyntheticConfig
from hybridlm.data.synthetic.source import GeneratedWindows, held_out, shown_examples
from hybridlm.data.windows.loader import TrainLoader, ValLoader

SECTION = SyntheticConfig(
    task="mqar", vocab_size=16, n_pairs=2, min_length=9, examples=50, val_examples=11, eval_lengths=(32, 16)
)


def loader(seed=3, *, accumulate=1, rank=0, world_size=1, workers=0, section=SECTION):
    source = GeneratedWindows(section, "train", 16, seed)
    micro = 8 // (accumulate * world_size)
    return TrainLoader(
        source,
        global_batch=8,
        micro_batch=micro,
        accumulate=accumulate,
        rank=rank,
        world_size=world_size,
        workers=workers,
    )


def take(one, count):
    def endless():
        while True:
            yield from one

    return list(itertools.islice(endless(), count))


def same(first, second):
    return all(
        torch.equal(a[name], b[name])
        for a, b in zip(first, second, strict=True)
        for name in ("ids", "targets", "n_targets")
    )


WANTED = take(loader(), 20)


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 4), (2, 2), (4, 1)])
def test_ranks_and_accumulation_change_no_global_batch(world_size, accumulate):
    ranks = [
        take(loader(accumulate=accumulate, rank=rank, world_size=world_size), 20 * accumulate)
        for rank in range(world_size)
    ]
    for step, wanted in enumerate(WANTED):
        parts = [batch for rank in ranks for batch in rank[step * accumulate : (step + 1) * accumulate]]
        for name in ("ids", "targets"):
            assert torch.equal(torch.cat([part[name] for part in parts]), wanted[name])
        assert {int(part["n_targets"]) for part in parts} == {int((wanted["targets"] >= 0).sum())}


def test_workers_and_resumes_give_the_same_batches():
    one = loader(workers=2)
    assert same(take(one, 20), WANTED)
    for stop in (1, 5, 6, 7, 13):  # an epoch is 6 steps
        first, second = loader(), loader()
        take(first, stop)
        second.load_state_dict(first.state_dict())
        assert same(take(second, 20 - stop), WANTED[stop:]), stop


def test_a_pass_holds_every_example_once_and_the_seed_changes_the_order_alone():
    def passes(seed):
        rows = torch.cat([batch["ids"] for batch in take(loader(seed), 25)])  # 200 rows, four passes of 50
        return [sorted(map(tuple, rows[first : first + 50].tolist())) for first in range(0, 200, 50)], rows

    (one, rows), (other, others) = passes(3), passes(4)
    assert one[0] == one[1] == one[2] == one[3] == other[0]
    assert not torch.equal(rows[:50], rows[50:100])
    assert not torch.equal(rows, others)


def test_validation_has_a_loader_for_each_length_that_of_training_first():
    config = DataConfig(source="synthetic", seq_len=16, synthetic=SECTION)
    windows = held_out(config)
    assert [one.seq_len for one in windows] == [16, 32]
    for one in windows:
        ranks = [
            list(ValLoader([one], batch_size=2, token_bytes=np.zeros(17, dtype=np.int32), rank=rank, world_size=2))
            for rank in range(2)
        ]
        targets = torch.cat([batch["targets"] for batches in ranks for batch in batches])
        asked = targets[(targets >= 0).any(dim=1)]
        assert asked.shape == (11, one.seq_len)
        assert torch.equal(asked, torch.from_numpy(one.rows(np.arange(11)).targets))
        assert sum(int(batch["n_bytes"]) for batches in ranks for batch in batches) == 0


def test_examples_are_shown_as_text():
    first, second = shown_examples(DataConfig(source="synthetic", seq_len=16, synthetic=SECTION), 2)
    assert first.count("[v") == second.count("[v") == 2
