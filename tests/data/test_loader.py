import itertools

import numpy as np
import pytest
import torch

from hybridlm.config.section import ConfigError
from hybridlm.data.loader import TrainLoader, ValLoader
from hybridlm.data.packing import pack
from hybridlm.data.tokenizer import byte_tokenizer
from hybridlm.data.windows import IGNORE, window_count

TOKENS = np.arange(1, 1000, dtype=np.uint16)  # each token names its own place


def train_loader(tokens=TOKENS, *, global_batch=8, accumulate=1, rank=0, world_size=1, seed=5, seq_len=16):
    micro_batch = global_batch // (accumulate * world_size)
    return TrainLoader(
        tokens,
        seq_len=seq_len,
        global_batch=global_batch,
        micro_batch=micro_batch,
        accumulate=accumulate,
        rank=rank,
        world_size=world_size,
        seed=seed,
    )


def endless(loader):
    while True:
        yield from loader


def take(loader, count):
    return [batch["ids"] for batch in itertools.islice(endless(loader), count)]


def global_batches(world_size, accumulate, steps):
    """The windows of each optimizer step, put together from all ranks and micro-batches."""
    per_rank = [
        take(train_loader(accumulate=accumulate, rank=rank, world_size=world_size), steps * accumulate) for rank in range(world_size)
    ]
    return [torch.cat([ids for batches in per_rank for ids in batches[k * accumulate : (k + 1) * accumulate]]) for k in range(steps)]


def test_targets_are_the_next_tokens():
    batch = next(iter(train_loader()))
    assert batch["ids"].shape == batch["targets"].shape == (8, 16)
    assert batch["ids"].dtype == batch["targets"].dtype == torch.int64
    assert torch.equal(batch["ids"] + 1, batch["targets"])
    assert batch["ids"].is_contiguous()
    assert batch["targets"].is_contiguous()


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 4), (2, 2), (4, 1), (2, 4), (8, 1)])
def test_the_global_batch_does_not_hang_on_ranks_or_accumulation(world_size, accumulate):
    for mine, reference in zip(global_batches(world_size, accumulate, 20), global_batches(1, 1, 20), strict=True):
        assert torch.equal(mine, reference)
    batch = next(iter(train_loader(accumulate=accumulate, world_size=world_size)))
    assert batch["n_targets"].item() == 8 * 16


def test_a_pass_holds_every_window_once_across_batches_and_epochs():
    count = window_count(len(TOKENS), 16)
    loader = train_loader()
    assert count % 8  # so passes end inside a batch
    assert len(loader) == count // 8
    firsts = torch.cat([ids[:, 0] for ids in take(loader, count)]).tolist()  # count batches are 8 passes
    for epoch in range(8):
        starts = sorted(firsts[epoch * count : (epoch + 1) * count])
        assert {b - a for a, b in itertools.pairwise(starts)} == {16}


def test_another_seed_is_another_order():
    assert not torch.equal(take(train_loader(seed=1), 1)[0], take(train_loader(seed=2), 1)[0])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumed_anywhere_it_goes_on_as_if_never_stopped(accumulate):
    whole = take(train_loader(accumulate=accumulate), 40)
    for stop in range(31):
        loader = train_loader(accumulate=accumulate)
        take(loader, stop)
        other = train_loader(accumulate=accumulate)
        other.load_state_dict(loader.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(take(other, 9), whole[stop : stop + 9], strict=True)), stop


def test_a_state_fits_other_ranks_and_another_accumulation():
    loader = train_loader(accumulate=4)
    take(loader, 10 * 4)
    for world_size, accumulate in ((2, 2), (4, 1), (1, 1), (1, 8)):
        parts = []
        for rank in range(world_size):
            other = train_loader(accumulate=accumulate, rank=rank, world_size=world_size)
            other.load_state_dict(loader.state_dict())
            parts += take(other, accumulate)
        assert torch.equal(torch.cat(parts), global_batches(1, 1, 11)[10])


def test_a_state_of_another_run_is_refused():
    state = train_loader().state_dict()
    with pytest.raises(ConfigError, match=r"data\.global_batch=4 differs from the checkpoint's 8"):
        train_loader(global_batch=4).load_state_dict(state)
    with pytest.raises(ConfigError, match="batch 50 of an epoch, which has 7 here"):
        train_loader().load_state_dict({**state, "batches": 50})


@pytest.mark.parametrize("n_tokens", [17, 18, 33, 40, 60])
def test_fewer_windows_than_a_batch_wrap_around(n_tokens):
    loader = train_loader(TOKENS[:n_tokens], accumulate=2)
    assert len(loader) == 2  # one optimizer step
    count = window_count(n_tokens, 16)
    firsts = torch.cat([ids[:, 0] for ids in take(loader, 12)]).tolist()
    for epoch in range(48 // count):
        starts = sorted(firsts[epoch * count : (epoch + 1) * count])
        assert [b - a for a, b in itertools.pairwise(starts)] == [16] * (count - 1)


def test_what_cannot_work_is_refused():
    with pytest.raises(ConfigError, match=r"data\.global_batch=9 is not .* = 4 x 2 x 1 = 8"):
        train_loader(global_batch=9, accumulate=2)
    with pytest.raises(ConfigError, match="the training text has 16 tokens"):
        train_loader(TOKENS[:16])


def val_batches(tokens, *, world_size=1, batch_size=3, seq_len=8, limit=None):
    bytes_of = byte_tokenizer().token_bytes()
    loaders = [
        ValLoader(
            tokens, seq_len=seq_len, batch_size=batch_size, token_bytes=bytes_of, rank=rank, world_size=world_size, limit_batches=limit
        )
        for rank in range(world_size)
    ]
    assert len({len(loader) for loader in loaders}) == 1
    assert all(len(list(loader)) == len(loader) for loader in loaders)
    return [batch for loader in loaders for batch in loader]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_validation_counts_every_target_and_byte_once(world_size):
    tokenizer = byte_tokenizer()
    texts = ["first text, é☃", "x", "the third and longest text of them all"]
    tokens = [tokenizer.eos_id]
    for text in texts:
        tokens += [*tokenizer.encode(text), tokenizer.eos_id]
    batches = val_batches(np.array(tokens, dtype=np.uint16), world_size=world_size)
    counted = [batch["targets"] != IGNORE for batch in batches]
    assert torch.cat([batch["targets"][mask] for batch, mask in zip(batches, counted, strict=True)]).tolist() == tokens[1:]
    assert torch.cat([batch["ids"][mask] for batch, mask in zip(batches, counted, strict=True)]).tolist() == tokens[:-1]
    assert [batch["n_targets"].item() for batch in batches] == [mask.sum().item() for mask in counted]
    assert sum(batch["n_bytes"].item() for batch in batches) == len("".join(texts).encode())
    assert {batch["ids"].shape for batch in batches} == {(3, 8)}


def test_a_limited_validation_spreads_over_the_text_whatever_the_ranks():
    tokens = np.arange(801, dtype=np.uint16) % 256
    firsts = []
    for world_size in (1, 2, 4):
        batches = val_batches(tokens, world_size=world_size, batch_size=2, limit=4)
        assert sum(batch["n_targets"].item() for batch in batches) == 8 * 8
        firsts.append([int(batch["ids"][row, 0]) for batch in batches for row in range(2)])
    assert firsts[0] == firsts[1] == firsts[2] == [place * 100 // 8 * 8 % 256 for place in range(8)]  # 8 of 100 windows


# Packed documents.

LENGTHS = [5, 0, 30, 12, 1, 1, 7, 16, 40, 3, 9, 2, 15, 11, 6]
EOS = 0
PACKED = np.array([token for length in LENGTHS for token in (EOS, *range(1, length + 1))] + [EOS], dtype=np.uint16)
PACKING = pack(np.flatnonzero(PACKED == EOS).astype(np.int64), 16)


def packed_loader(*, rank=0, world_size=1, accumulate=1, isolate=True, seed=5):
    return TrainLoader(
        PACKED,
        seq_len=16,
        global_batch=4,
        micro_batch=4 // (world_size * accumulate),
        accumulate=accumulate,
        rank=rank,
        world_size=world_size,
        seed=seed,
        packing=PACKING,
        isolate=isolate,
    )


def packed_steps(world_size, accumulate, steps):
    """The batches of each optimizer step, put together from all ranks and micro-batches."""
    ranks = [packed_loader(rank=rank, world_size=world_size, accumulate=accumulate) for rank in range(world_size)]
    taken = [list(itertools.islice(endless(loader), steps * accumulate)) for loader in ranks]
    grouped = [[batch for batches in taken for batch in batches[k * accumulate : (k + 1) * accumulate]] for k in range(steps)]
    return [{name: torch.cat([batch[name] for batch in step]) for name in ("ids", "targets", "doc_ids")} for step in grouped], grouped


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_packed_batches_do_not_hang_on_ranks_or_accumulation(world_size, accumulate):
    (mine, parts), (reference, _) = packed_steps(world_size, accumulate, 9), packed_steps(1, 1, 9)
    for step, want, batches in zip(mine, reference, parts, strict=True):
        assert all(torch.equal(step[name], want[name]) for name in want)
        counted = int((step["targets"] != IGNORE).sum())
        assert [int(batch["n_targets"]) for batch in batches] == [counted] * len(batches)


def test_a_pass_holds_every_packed_pair_once():
    """A pass of the windows, whole steps or not: the sequence goes on from one into the next."""
    steps = -(-len(PACKING) // 4)
    rows = [row for batch in itertools.islice(endless(packed_loader()), steps) for row in zip(batch["ids"], batch["targets"], strict=True)]
    pairs = [
        pair for ids, targets in rows[: len(PACKING)] for pair in zip(ids.tolist(), targets.tolist(), strict=True) if pair[1] != IGNORE
    ]
    assert sorted(pairs) == sorted(zip(PACKED[:-1].tolist(), PACKED[1:].tolist(), strict=True))


def test_documents_are_given_to_the_model_only_where_they_are_kept_apart():
    apart, together = (next(iter(packed_loader(isolate=isolate))) for isolate in (True, False))
    assert "doc_ids" not in together
    assert torch.equal(apart["ids"], together["ids"])
    assert bool(((apart["doc_ids"] < 0) == (apart["targets"] == IGNORE)).all())


def test_a_packed_loader_goes_on_where_it_stood():
    loader = packed_loader()
    ahead = [batch["ids"] for batch in itertools.islice(endless(loader), 7)]
    for stop in range(1, 6):
        first, second = packed_loader(), packed_loader()
        for _ in itertools.islice(endless(first), stop):
            pass
        second.load_state_dict(first.state_dict())
        rest = [batch["ids"] for batch in itertools.islice(endless(second), 7 - stop)]
        assert all(torch.equal(a, b) for a, b in zip(rest, ahead[stop:], strict=True))
