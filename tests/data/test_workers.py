"""Batches made ahead by threads: the same ones in the same order, and a state that counts what was handed out."""

import itertools

import numpy as np
import pytest
import torch
from streams import EOS, raw_stream, some_documents, split

from hybridlm.data.windows.loader import TrainLoader
from hybridlm.data.windows.packed_files import PackedStream
from hybridlm.data.windows.window_sources import CutWindows, Mixture, PackedWindows


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    text = split(folder / "documents", some_documents(80, seed=1)).stream
    packed = PackedWindows(PackedStream(text, 16, eos_id=EOS, folder=folder / "packed"), 3, isolate=True)
    cut = [CutWindows(raw_stream(folder / str(k), [np.arange(400), np.arange(300)]), 16, k) for k in range(2)]
    return {"packed": packed, "mixture": Mixture(cut, [1.0, 2.0], 5)}


def loader_of(source, workers, accumulate=2):
    return TrainLoader(
        source,
        global_batch=8,
        micro_batch=8 // accumulate,
        accumulate=accumulate,
        rank=0,
        world_size=1,
        workers=workers,
    )


def take(loader, count):
    def endless():
        while True:
            yield from loader

    return list(itertools.islice(endless(), count))


def same(ours, theirs):
    return len(ours) == len(theirs) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("kind", ["packed", "mixture"])
def test_workers_give_the_same_batches_as_no_workers(sources, kind, workers):
    alone, helped = loader_of(sources[kind], 0), loader_of(sources[kind], workers)
    count = 20 * len(alone) + 3  # over the ends of epochs
    assert same(take(helped, count), take(alone, count))
    assert helped.state_dict() == alone.state_dict()


def test_resumed_at_any_step_with_workers(sources):
    whole = take(loader_of(sources["mixture"], 0), 40)
    loader, other = loader_of(sources["mixture"], 2), loader_of(sources["mixture"], 1)
    for stop in range(1, 30):  # one after the other; the other goes to each place and reads on
        assert same(take(loader, 1), whole[stop - 1 : stop])
        assert loader.state_dict()["epoch"] * len(loader) + loader.state_dict()["batches"] == stop
        if stop % 9 == 0:
            other.load_state_dict(loader.state_dict())
            assert same(take(other, 5), whole[stop : stop + 5])
    assert same(take(loader, 3), whole[29:32])


def test_workers_draw_nothing_from_torchs_generator(sources):
    before = torch.random.get_rng_state()
    take(loader_of(sources["mixture"], 1), 2)
    assert torch.equal(torch.random.get_rng_state(), before)
