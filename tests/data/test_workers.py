"""Worker processes: the same batches in the same order, a state that counts what was handed out, and an end with the
trainer."""

import itertools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from forks import forked
from streams import EOS, raw_stream, some_documents, split

from hybridlm.data.windows.loader import TrainLoader
from hybridlm.data.windows.mixture import Mixture
from hybridlm.data.windows.packed_files import PackedStream
from hybridlm.data.windows.window_sources import CutWindows, PackedWindows
from hybridlm.data.windows.workers import _begin


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    text = split(folder / "documents", some_documents(80, seed=1)).stream
    packed = PackedWindows(PackedStream(text, 16, eos_id=EOS, folder=folder / "packed"), 3, isolate=True)
    cut = [CutWindows(raw_stream(folder / str(k), [np.arange(400), np.arange(300)]), 16, k) for k in range(2)]
    return {"packed": packed, "mixture": Mixture(cut, [1.0, 2.0], 5)}


def loader_of(source, workers, context=None, accumulate=2):
    return TrainLoader(
        source,
        global_batch=8,
        micro_batch=8 // accumulate,
        accumulate=accumulate,
        rank=0,
        world_size=1,
        workers=workers,
        context=context,
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


@pytest.mark.parametrize(("kind", "context"), [("packed", "fork"), ("mixture", "fork"), ("packed", "spawn")])
def test_workers_give_the_same_batches_as_no_workers(sources, kind, context):
    if context not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {context}")
    alone, helped = loader_of(sources[kind], 0), loader_of(sources[kind], 2, context)
    count = 2 * len(alone) + 3  # over the ends of epochs
    try:
        assert same(take(helped, count), take(alone, count))
        assert helped.state_dict() == alone.state_dict()
        assert len(multiprocessing.active_children()) == 2  # the same two all the time
    finally:
        helped.close()
    assert not multiprocessing.active_children()


def test_resumed_at_any_step_with_workers(sources):
    whole = take(loader_of(sources["mixture"], 0), 40)
    loader, other = loader_of(sources["mixture"], 2), loader_of(sources["mixture"], 1)
    for stop in range(1, 30):  # one after the other; the other goes to each place and reads on
        assert same(take(loader, 1), whole[stop - 1 : stop])
        assert loader.state_dict()["epoch"] * len(loader) + loader.state_dict()["batches"] == stop
        if stop % 9 == 0:
            other.load_state_dict(loader.state_dict())
            assert same(take(other, 5), whole[stop : stop + 5])
    loader.close()
    assert same(take(loader, 3), whole[29:32])  # with new workers
    loader.close()
    other.close()


def test_workers_draw_nothing_from_torchs_generator(sources):
    before = torch.random.get_rng_state()
    loader = loader_of(sources["mixture"], 1)
    take(loader, 2)
    loader.close()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_workers_end_with_the_loader(sources):
    loader = loader_of(sources["mixture"], 2)
    take(loader, 1)
    assert len(multiprocessing.active_children()) == 2
    del loader
    assert not multiprocessing.active_children()


CHILD = """
import multiprocessing, os, pickle, sys, time
from hybridlm.data.windows.loader import TrainLoader
shape = dict(global_batch=8, micro_batch=8, accumulate=1, rank=0, world_size=1, workers=2, context=sys.argv[3])
loader = TrainLoader(pickle.load(open(sys.argv[1], "rb")), **shape)
batches = iter(loader)
next(batches)
print(*[child.pid for child in multiprocessing.active_children()], flush=True)
if sys.argv[2] == "exception":
    raise RuntimeError("broken off")
time.sleep(60)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals to a group of processes")
@pytest.mark.parametrize(
    ("end", "context"),
    [("exception", "fork"), ("SIGINT", "fork"), ("SIGKILL", "fork"), ("SIGKILL", "spawn"), ("SIGKILL", "forkserver")],
)
def test_workers_end_with_the_process_however_it_ends(sources, tmp_path, end, context):
    if context not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {context}")
    (tmp_path / "source").write_bytes(pickle.dumps(sources["mixture"]))
    line = [sys.executable, "-c", CHILD, str(tmp_path / "source"), end, context]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    workers = [int(word) for word in process.stdout.readline().split()]
    assert len(workers) == 2
    if end == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    elif end == "SIGKILL":
        process.kill()
    process.wait(timeout=60)
    deadline = time.monotonic() + 2  # a quarter of a second between two looks, and the machine may be busy
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    errors = process.stderr.read()
    assert errors.count("Traceback") == (0 if end == "SIGKILL" else 1)  # the trainer's own, none of the workers'


@pytest.mark.skipif(os.name != "posix", reason="parents of processes")
@pytest.mark.parametrize(("trainer", "begins"), [(os.getppid, True), (os.getpid, False), (lambda: None, True)])
def test_a_worker_ends_if_its_trainer_is_gone_before_it_starts(tmp_path, trainer, begins):
    def begin():
        _begin(trainer(), 0)
        (tmp_path / "began").touch()

    with (tmp_path / "said").open("w") as said:
        worker = forked(begin, output=said.fileno())
    worker.join()
    assert (worker.exitcode, (tmp_path / "began").exists(), (tmp_path / "said").read_text()) == (0, begins, "")


def alive(pid):
    """Whether a process runs; one that has ended and that nobody has asked about does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return not os.path.exists("/proc")
