"""How fast a corpus is tokenised, and in how much memory.

rate: one core tokenises 8 MB of JSON lines with a BPE of 32,768 ids, as a worker of `hybridlm prepare` does, against
the tokenizers library's own batches of the same texts. memory: `hybridlm prepare` as a command, on 0.5 GB and on 2 GB
with 1% of bad lines, tokenizer training included: the largest sum of resident memory over all its processes, and the
time. Takes about 20 minutes on 2 cores and 5 GB of disk.

python benchmarks/prepare.py [--only rate|memory] [--rounds N]      prints the tables and writes
benchmarks/results/prepare_*.md
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness.report import BOUNDS, bound_row, run, table
from harness.texts import write_lines
from harness.turns import take_turns

from hybridlm.data.preparing.split import Split
from hybridlm.data.preparing.tokenise import Task, tokenise
from hybridlm.data.reading.documents import Document, TextRecords
from hybridlm.data.reading.file_units import FilePart, SourceFile
from hybridlm.data.tokenizer import train_bpe

VOCAB = 32_768
RATE_BYTES = 8_000_000
BATCH = 200  # texts of a batch, about 0.5 MB, at which the library is fastest here
SIZES = (500_000_000, 2_000_000_000)


def rate(rounds: int) -> list[str]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as in a worker: one core
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "texts.jsonl"
        write_lines(path, RATE_BYTES)
        unit = FilePart(SourceFile("texts.jsonl", path), TextRecords("text"), "lines")
        texts = [document.text for document in unit.documents() if isinstance(document, Document)]
        tokenizer = train_bpe(texts, VOCAB)
        tokenizer.save(folder / "tokenizer.json")
        library = tokenizer._library
        task = Task(folder, folder / "tokenizer.json", False, Split(0.05), False, False, 64_000_000)

        def alone() -> None:
            for first in range(0, len(texts), BATCH):
                library.encode_batch_fast(texts[first : first + BATCH], add_special_tokens=False)

        times = take_turns({"library": alone, "ours": lambda: tokenise(task, 0, unit)}, rounds)
    ratio = times.ratio("library", "ours")
    rates = ", ".join(f"{name} {RATE_BYTES / 1e6 / times.median(name):.2f} MB/s" for name in ("library", "ours"))
    rows = [bound_row("rate of `prepare`'s worker over the library's", ratio, 0.9, 1.0, "more")]
    return [f"{RATE_BYTES / 1e6:.0f} MB, {VOCAB:,} ids, {rounds} rounds, one core: {rates}", "", *table(BOUNDS, rows)]


def memory(rounds: int) -> list[str]:
    """Once, whatever ``rounds`` is: a peak is a peak."""
    rows = []
    for size in SIZES:
        with tempfile.TemporaryDirectory() as name:
            write_lines(Path(name) / "texts.jsonl", size, bad=0.01)
            peak, seconds = _prepare(Path(name))
        rows.append(
            [f"{size / 1e9:.1f} GB", f"{peak / 1e6:,.0f} MB", f"{seconds:.0f} s, {size / 1e6 / seconds:.2f} MB/s"]
        )
    return table(("corpus", "largest sum of resident memory (bound 1,500 MB)", "time"), rows)


def _prepare(folder: Path) -> tuple[int, float]:
    """Peak of resident bytes over all processes, looked at ten times a second, and seconds."""
    overrides = [
        "data=files",
        f"data.path={folder}/texts.jsonl",
        f"data.out={folder}/out",
        f"data.tokenizer.vocab_size={VOCAB}",
    ]
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "hybridlm", "prepare", *overrides], stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(_resident(pid) for pid in _family(process.pid)))
        time.sleep(0.1)
    if process.returncode:
        raise RuntimeError(f"prepare ended with {process.returncode}")
    return peak, time.perf_counter() - began


def _family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(other for child in children for other in _family(int(child)))]


def _resident(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")), 0)


if __name__ == "__main__":
    run("prepare", __doc__, {"rate": rate, "memory": memory})
