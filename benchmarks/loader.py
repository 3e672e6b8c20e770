"""How fast windows come from token files that are in the page cache: tokens/s of one process without workers.

Files of u16 ids with documents of log-normal lengths (400 tokens in the median) are generated in a temporary folder;
every call reads one micro-batch as training gets it.

python benchmarks/loader.py [--rounds N]      prints the table and writes benchmarks/results/loader.md
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from harness.report import run, table
from harness.turns import take_turns

from hybridlm.data.files.bins import BinWriter, open_bin
from hybridlm.data.files.stream import TokenStream, joined
from hybridlm.data.windows.loader import Batch, TrainLoader
from hybridlm.data.windows.packed_files import PackedStream
from hybridlm.data.windows.window_sources import CutWindows, PackedWindows, Source

TOKENS = 40_000_000  # of every stream
VOCAB = 50_257
FILES = (1, 40)
SHAPES = ((1024, 32), (256, 8), (2048, 8))  # seq_len, micro-batch
CALL_TOKENS = 1_000_000  # in a call, of which a round has one


def _stream(folder: Path, files: int) -> TokenStream:
    rng = np.random.default_rng(0)
    opened = []
    for number in range(files):
        path = folder / f"{files}-{number}.bin"
        with BinWriter(path, eos_id=VOCAB - 1, vocab_size=VOCAB, tokenizer="none") as writer:
            while writer.count < TOKENS // files:
                writer.add(rng.integers(0, VOCAB - 1, int(rng.lognormal(6.0, 1.2)) + 1), 0)
            opened.append(open_bin(path, writer.finish(), verify=False))
    return TokenStream(joined(opened))


def _source(way: str, stream: TokenStream, seq_len: int, folder: Path) -> Source:
    if way == "cut":
        return CutWindows(stream, seq_len, 0)
    return PackedWindows(PackedStream(stream, seq_len, eos_id=VOCAB - 1, folder=folder), 0, isolate=True)


def _endless(loader: TrainLoader) -> Iterator[Batch]:
    while True:
        yield from loader


def _contender(source: Source, batch: int) -> Callable[[], object]:
    loader = TrainLoader(source, global_batch=batch, micro_batch=batch, accumulate=1, rank=0, world_size=1)
    batches, calls = _endless(loader), CALL_TOKENS // (batch * source.seq_len)

    def call() -> None:
        for _ in range(calls):
            next(batches)

    return call


def measure(rounds: int) -> list[str]:
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for files in FILES:
            stream = _stream(Path(name), files)
            for seq_len, batch in SHAPES:
                sources = {
                    way: _source(way, stream, seq_len, Path(name) / f"{files}-{seq_len}") for way in ("cut", "packed")
                }
                times = take_turns({way: _contender(source, batch) for way, source in sources.items()}, rounds)
                for way in sources:
                    tokens = CALL_TOKENS // (batch * seq_len) * batch * seq_len
                    rates = [tokens / seconds / 1e6 for seconds in times.seconds[way]]
                    speed = f"{statistics.median(rates):.1f} [{min(rates):.1f}, {max(rates):.1f}]"
                    rows.append([str(files), f"{batch} x {seq_len}", way, speed])
    header = ("files", "micro-batch x seq_len", "windows", "million tokens/s: median [min, max] of the rounds")
    return [
        f"{TOKENS:,} tokens a stream, {rounds} rounds of {CALL_TOKENS:,} tokens, one thread",
        "",
        *table(header, rows),
    ]


if __name__ == "__main__":
    run("loader", __doc__, {"windows": measure})
