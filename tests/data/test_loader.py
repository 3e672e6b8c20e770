import itertools
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from streams import EOS, raw_stream, some_documents, split

from hybridlm.data.tokenizer import byte_tokenizer
from hybridlm.data.windows.loader import TrainLoader, ValLoader
from hybridlm.data.windows.order import IGNORE, window_count
from hybridlm.data.windows.packed_files import PackedStream
from hybridlm.data.windows.window_sources import CutWindows, Mixture, PackedWindows, SideBySide
from hybridlm.errors import UserError

FOLDER = tempfile.TemporaryDirectory()
COUNT = 999  # tokens 1, 2, ...: each names its own place


@cache
def stream(count=COUNT, pieces=1, masked_up_to=None):
    """Tokens 1, 2, ... in so many files; with a mask, those up to a place are not learned."""
    arrays = np.array_split(np.arange(1, count + 1), pieces)
    masks = None if masked_up_to is None else [array > masked_up_to for array in arrays]
    return raw_stream(Path(FOLDER.name) / f"{count}-{pieces}-{masked_up_to}", arrays, masks)


def loader_of(source, *, global_batch=8, accumulate=1, rank=0, world_size=1):
    return TrainLoader(
        source,
        global_batch=global_batch,
        micro_batch=global_batch // (accumulate * world_size),
        accumulate=accumulate,
        rank=rank,
        world_size=world_size,
    )


def train_loader(count=COUNT, *, pieces=1, seed=5, seq_len=16, global_batch=8, accumulate=1, rank=0, world_size=1):
    source = CutWindows(stream(count, pieces), seq_len, seed)
    return loader_of(source, global_batch=global_batch, accumulate=accumulate, rank=rank, world_size=world_size)


def endless(loader):
    while True:
        yield from loader


def take(loader, count):
    return [batch["ids"] for batch in itertools.islice(endless(loader), count)]


def global_batches(world_size, accumulate, steps):
    """The windows of each optimizer step, put together from all ranks and micro-batches."""
    per_rank = [
        take(train_loader(accumulate=accumulate, rank=rank, world_size=world_size), steps * accumulate)
        for rank in range(world_size)
    ]
    return [
        torch.cat([ids for batches in per_rank for ids in batches[k * accumulate : (k + 1) * accumulate]])
        for k in range(steps)
    ]


def test_targets_are_the_next_tokens():
    batch = next(iter(train_loader()))
    assert batch["ids"].shape == batch["targets"].shape == (8, 16)
    assert batch["ids"].dtype == batch["targets"].dtype == torch.int64
    assert torch.equal(batch["ids"] + 1, batch["targets"])
    assert batch["ids"].is_contiguous()
    assert batch["targets"].is_contiguous()


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 4), (2, 2), (4, 1), (2, 4), (8, 1)])
def test_the_global_batch_does_not_depend_on_ranks_or_accumulation(world_size, accumulate):
    for mine, reference in zip(global_batches(world_size, accumulate, 20), global_batches(1, 1, 20), strict=True):
        assert torch.equal(mine, reference)
    batch = next(iter(train_loader(accumulate=accumulate, world_size=world_size)))
    assert batch["n_targets"].item() == 8 * 16


def test_a_pass_holds_every_window_once_across_batches_and_epochs():
    count = window_count(COUNT, 16)
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
def test_a_loader_resumed_anywhere_continues_exactly(accumulate):
    whole = take(train_loader(accumulate=accumulate), 40)
    for stop in range(31):
        loader = train_loader(accumulate=accumulate)
        take(loader, stop)
        other = train_loader(accumulate=accumulate)
        other.load_state_dict(loader.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(take(other, 9), whole[stop : stop + 9], strict=True)), stop


def test_a_state_fits_different_ranks_and_accumulation():
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
    with pytest.raises(UserError, match=r"data\.global_batch=4 differs from the checkpoint's 8"):
        train_loader(global_batch=4).load_state_dict(state)
    with pytest.raises(UserError, match="batch 50 of an epoch, which has 7"):
        train_loader().load_state_dict({**state, "batches": 50})


@pytest.mark.parametrize("n_tokens", [17, 18, 33, 40, 60])
def test_fewer_windows_than_a_batch_wrap_around(n_tokens):
    loader = train_loader(n_tokens, accumulate=2)
    assert len(loader) == 2  # one optimizer step
    count = window_count(n_tokens, 16)
    firsts = torch.cat([ids[:, 0] for ids in take(loader, 12)]).tolist()
    for epoch in range(48 // count):
        starts = sorted(firsts[epoch * count : (epoch + 1) * count])
        assert [b - a for a, b in itertools.pairwise(starts)] == [16] * (count - 1)


def test_what_cannot_work_is_refused():
    with pytest.raises(UserError, match=r"data\.global_batch = 9: is not .* = 8"):
        train_loader(global_batch=9, accumulate=2)
    with pytest.raises(UserError, match="the training text has 16 tokens"):
        train_loader(16)


def test_many_files_are_read_as_one_bit_for_bit():
    one, many = (
        take(train_loader(pieces=pieces, seq_len=32), 40) for pieces in (1, 90)
    )  # windows of 33 tokens, files of 11
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def test_batches_are_fresh_tensors():
    loader = train_loader()
    first, second = itertools.islice(loader, 2)
    kept = first["ids"].clone()
    first["targets"].zero_()
    second["ids"].zero_()
    assert torch.equal(first["ids"], kept)


# Masks.


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_masked_targets_are_counted_over_the_whole_global_batch(world_size, accumulate):
    source = CutWindows(stream(masked_up_to=600), 16, 5)
    plain = itertools.islice(endless(train_loader()), 20)
    ranks = [
        itertools.islice(
            endless(loader_of(source, rank=rank, world_size=world_size, accumulate=accumulate)), 20 * accumulate
        )
        for rank in range(world_size)
    ]
    taken = [list(batches) for batches in ranks]
    for step, whole in enumerate(plain):
        mine = [batch for batches in taken for batch in batches[step * accumulate : (step + 1) * accumulate]]
        assert torch.equal(torch.cat([batch["ids"] for batch in mine]), whole["ids"])
        wanted = torch.where(whole["targets"] > 600, whole["targets"], IGNORE)
        assert torch.equal(torch.cat([batch["targets"] for batch in mine]), wanted)
        assert {int(batch["n_targets"]) for batch in mine} == {int((wanted != IGNORE).sum())}


def test_a_global_batch_without_a_target_divides_by_one():
    batch = next(iter(loader_of(CutWindows(stream(masked_up_to=COUNT), 16, 5))))
    assert bool((batch["targets"] == IGNORE).all())
    assert batch["n_targets"].item() == 1


# Validation.


def byte_stream(name, ids, pieces=1):
    return raw_stream(Path(FOLDER.name) / name, np.array_split(np.array(ids), pieces))


def val_batches(parts, *, world_size=1, batch_size=3, limit=None, masked=False):
    bytes_of = byte_tokenizer().token_bytes()
    loaders = [
        ValLoader(
            parts,
            batch_size=batch_size,
            token_bytes=bytes_of,
            rank=rank,
            world_size=world_size,
            limit_batches=limit,
            masked=masked,
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
    batches = val_batches([SideBySide(byte_stream("texts", tokens, pieces=3), 8)], world_size=world_size)
    counted = [batch["targets"] != IGNORE for batch in batches]
    assert (
        torch.cat([batch["targets"][mask] for batch, mask in zip(batches, counted, strict=True)]).tolist() == tokens[1:]
    )
    assert torch.cat([batch["ids"][mask] for batch, mask in zip(batches, counted, strict=True)]).tolist() == tokens[:-1]
    assert [batch["n_targets"].item() for batch in batches] == [mask.sum().item() for mask in counted]
    assert sum(batch["n_bytes"].item() for batch in batches) == len("".join(texts).encode())
    assert {batch["ids"].shape for batch in batches} == {(3, 8)}


def test_a_limited_validation_spreads_over_the_text_whatever_the_ranks():
    parts = [SideBySide(byte_stream("counting", np.arange(801) % 256), 8)]
    firsts = []
    for world_size in (1, 2, 4):
        batches = val_batches(parts, world_size=world_size, batch_size=2, limit=4)
        assert sum(batch["n_targets"].item() for batch in batches) == 8 * 8
        firsts.append([int(batch["ids"][row, 0]) for batch in batches for row in range(2)])
    assert firsts[0] == firsts[1] == firsts[2] == [place * 100 // 8 * 8 % 256 for place in range(8)]  # 8 of 100 windows


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("limit", [None, 4])
def test_validation_reads_one_part_after_the_other(world_size, limit):
    parts = [SideBySide(byte_stream(f"part{k}", np.arange(count) + 60 * k), 8) for k, count in enumerate((30, 2, 100))]
    batches = val_batches(parts, world_size=world_size, batch_size=2, limit=limit)
    targets = torch.cat([batch["targets"][batch["targets"] != IGNORE] for batch in batches]).tolist()
    starts = [[place + 60 * k for place in range(0, count - 1, 8)] for k, count in enumerate((30, 2, 100))]
    windows = [
        range(first + 1, min(first + 9, 60 * k + count)) for k, count in enumerate((30, 2, 100)) for first in starts[k]
    ]
    chosen = windows if limit is None else [windows[place * len(windows) // 8] for place in range(8)]
    assert targets == [token for window in chosen for token in window]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("isolate", [True, False])
def test_packed_validation_counts_every_byte_once_over_the_ranks(tmp_path, world_size, isolate):
    texts = [split(tmp_path / str(k), some_documents(20, seed=k), files=2) for k in range(2)]
    parts = [
        PackedWindows(PackedStream(text.stream, 16, eos_id=EOS, folder=tmp_path / f"packed{k}"), 0, isolate=isolate)
        for k, text in enumerate(texts)
    ]
    batches = val_batches(parts, world_size=world_size, batch_size=4)
    assert sum(int(batch["n_bytes"]) for batch in batches) == sum(text.text_bytes for text in texts)
    assert sum(int(batch["n_targets"]) for batch in batches) == sum(len(text.stream) - 1 for text in texts)
    assert {"doc_ids" in batch for batch in batches} == {isolate}
    assert {tensor.shape for batch in batches for name, tensor in batch.items() if not name.startswith("n_")} == {
        (4, 16)
    }


@pytest.mark.parametrize("packed", [True, False])
def test_validation_counts_the_bytes_of_learned_tokens_alone(tmp_path, packed):
    documents = some_documents(20, seed=1)
    rng = np.random.default_rng(0)
    text = split(tmp_path / "val", documents, learned=[(rng.random(len(ids)) < 0.4).tolist() for ids in documents])
    kept = PackedStream(text.stream, 16, eos_id=EOS, folder=tmp_path / "packed")
    batches = val_batches(
        [PackedWindows(kept, 0, isolate=True) if packed else SideBySide(text.stream, 16)], world_size=2
    )
    assert sum(int(batch["n_bytes"]) for batch in batches) == text.text_bytes
    assert sum(int(batch["n_targets"]) for batch in batches) == text.text_bytes  # a byte is a token
    assert sum(int((batch["targets"] != IGNORE).sum()) for batch in batches) == text.text_bytes


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("world_size", [1, 3])
def test_validation_skips_windows_without_targets(tmp_path, packed, world_size):
    """Conversations of long questions and an answer of two letters: most windows hold nothing to learn, and weigh
    nothing."""
    documents = [[1] * (90 + number) + [2, 3] for number in range(12)]
    text = split(tmp_path / "val", documents, learned=[[False] * (len(ids) - 2) + [True] * 2 for ids in documents])
    kept = PackedStream(text.stream, 16, eos_id=EOS, folder=tmp_path / "packed")
    parts = [PackedWindows(kept, 0, isolate=True) if packed else SideBySide(text.stream, 16)]
    assert (parts[0].targets(np.arange(parts[0].numbers)) == 0).sum() > 50
    whole = val_batches(parts, world_size=world_size, masked=True)
    assert sum(int(batch["n_targets"]) for batch in whole) == 2 * 12
    assert len(whole) <= -(-24 // (3 * world_size)) * world_size, "a batch holds no window in vain"
    limited = val_batches(parts, world_size=1, limit=2, masked=True)
    assert all(int((row != IGNORE).sum()) for batch in limited for row in batch["targets"])
    nothing = split(tmp_path / "nothing", documents, learned=[[False] * len(ids) for ids in documents])
    with pytest.raises(UserError, match="the validation text has nothing to predict"):
        val_batches([SideBySide(nothing.stream, 16)], masked=True)


# Packed documents.

LENGTHS = [5, 0, 30, 12, 1, 1, 7, 16, 40, 3, 9, 2, 15, 11, 6]
PACKED = [token for length in LENGTHS for token in (EOS, *range(1, length + 1))] + [EOS]


@cache
def packed_stream(pieces=2):
    folder = Path(FOLDER.name) / f"documents{pieces}"
    text = split(folder, [range(1, length + 1) for length in LENGTHS], files=pieces)
    return PackedStream(text.stream, 16, eos_id=EOS, folder=folder / "packed")


def packed_loader(*, rank=0, world_size=1, accumulate=1, isolate=True, seed=5):
    source = PackedWindows(packed_stream(), seed, isolate=isolate)
    return loader_of(source, global_batch=4, rank=rank, world_size=world_size, accumulate=accumulate)


def packed_steps(world_size, accumulate, steps):
    """The batches of each optimizer step, put together from all ranks and micro-batches."""
    ranks = [packed_loader(rank=rank, world_size=world_size, accumulate=accumulate) for rank in range(world_size)]
    taken = [list(itertools.islice(endless(loader), steps * accumulate)) for loader in ranks]
    grouped = [
        [batch for batches in taken for batch in batches[k * accumulate : (k + 1) * accumulate]] for k in range(steps)
    ]
    return [
        {name: torch.cat([batch[name] for batch in step]) for name in ("ids", "targets", "doc_ids")} for step in grouped
    ], grouped


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_packed_batches_do_not_depend_on_ranks_or_accumulation(world_size, accumulate):
    (mine, parts), (reference, _) = packed_steps(world_size, accumulate, 9), packed_steps(1, 1, 9)
    for step, want, batches in zip(mine, reference, parts, strict=True):
        assert all(torch.equal(step[name], want[name]) for name in want)
        counted = int((step["targets"] != IGNORE).sum())
        assert [int(batch["n_targets"]) for batch in batches] == [counted] * len(batches)


def test_a_pass_holds_every_packed_pair_once():
    """A pass of the windows, whole steps or not: the sequence goes on from one into the next."""
    count = len(packed_stream())
    steps = -(-count // 4)
    rows = [
        row
        for batch in itertools.islice(endless(packed_loader()), steps)
        for row in zip(batch["ids"], batch["targets"], strict=True)
    ]
    pairs = [
        pair
        for ids, targets in rows[:count]
        for pair in zip(ids.tolist(), targets.tolist(), strict=True)
        if pair[1] != IGNORE
    ]
    assert sorted(pairs) == sorted(itertools.pairwise(PACKED))


def test_doc_ids_are_given_only_if_documents_are_isolated():
    apart, together = (next(iter(packed_loader(isolate=isolate))) for isolate in (True, False))
    assert "doc_ids" not in together
    assert torch.equal(apart["ids"], together["ids"])
    assert bool(((apart["doc_ids"] < 0) == (apart["targets"] == IGNORE)).all())


def test_a_packed_loader_resumes_exactly():
    loader = packed_loader()
    ahead = [batch["ids"] for batch in itertools.islice(endless(loader), 7)]
    for stop in range(1, 6):
        first, second = packed_loader(), packed_loader()
        for _ in itertools.islice(endless(first), stop):
            pass
        second.load_state_dict(first.state_dict())
        rest = [batch["ids"] for batch in itertools.islice(endless(second), 7 - stop)]
        assert all(torch.equal(a, b) for a, b in zip(rest, ahead[stop:], strict=True))


# Mixtures.


def mixed_loader(*, rank=0, world_size=1, accumulate=1):
    parts = [CutWindows(stream(count, pieces=3), 16, seed) for seed, count in enumerate((COUNT, 200))]
    source = Mixture(parts, [2.0, 1.0], seed=5)
    return loader_of(source, rank=rank, world_size=world_size, accumulate=accumulate)


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 4), (2, 2), (8, 1)])
def test_a_mixture_does_not_depend_on_ranks_or_accumulation(world_size, accumulate):
    whole = take(mixed_loader(), 30)
    loaders = [mixed_loader(rank=rank, world_size=world_size, accumulate=accumulate) for rank in range(world_size)]
    parts = [take(loader, 30 * accumulate) for loader in loaders]
    for step, wanted in enumerate(whole):
        assert torch.equal(
            torch.cat([ids for part in parts for ids in part[step * accumulate : (step + 1) * accumulate]]), wanted
        )


def test_a_mixture_resumed_anywhere_continues_exactly():
    whole = take(mixed_loader(), 40)
    for stop in range(0, 31, 3):
        loader, other = mixed_loader(), mixed_loader()
        take(loader, stop)
        other.load_state_dict(loader.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(take(other, 9), whole[stop : stop + 9], strict=True)), stop
