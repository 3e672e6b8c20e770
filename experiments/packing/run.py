"""What do whole documents in a window, and keeping them apart, do to a small model? Three ways to cut the same short
documents.

python experiments/packing/run.py            # writes results.md and results.json beside this file
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from hybridlm.cli.compose import compose_config
from hybridlm.config.data import DataConfig
from hybridlm.data.preparing.prepare import prepare
from hybridlm.data.reading.documents import Document
from hybridlm.data.reading.sources import open_corpus
from hybridlm.data.windows.splits import packed_documents, val_windows
from hybridlm.runs.checkpoint import LoadedRun, load_run

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
SEQ_LEN, BATCH = 512, 8
WAYS = {
    "cut anywhere": [],
    "packed, not isolated": ["data.packing=true", "data.isolate=false"],
    "packed, isolated": ["data.packing=true", "data.isolate=true"],
}


def functions(work: Path) -> Iterator[str]:
    """Every function of the interpreter's own library that stands at the top of a module or a class: short documents,
    25 at least."""
    units = open_corpus(DataConfig(), unit_bytes=64_000_000, cache=work).units
    for module in (document for unit in units for document in unit.documents()):
        if not isinstance(module, Document):
            continue
        try:
            tree = ast.parse(module.text)
        except (SyntaxError, ValueError):
            continue
        lines = module.text.splitlines(keepends=True)
        for node in [
            *tree.body,
            *(inner for outer in tree.body if isinstance(outer, ast.ClassDef) for inner in outer.body),
        ]:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                text = "".join(line[node.col_offset :] or "\n" for line in lines[node.lineno - 1 : node.end_lineno])
                if len(text) >= 25:
                    yield text


def train(way: str, seed: int, corpus: Path, steps: int, work: Path) -> dict[str, object]:
    """One run of train.py, and its held-out functions read each separately."""
    folder = work / f"{way.replace(', ', '-').replace(' ', '_')}-{seed}"
    overrides = [
        "data=files",
        f"data.path={corpus}",
        f"data.out={work / 'data'}",
        f"data.seq_len={SEQ_LEN}",
        f"data.global_batch={BATCH}",
    ]
    config = compose_config(overrides).data
    overrides += [
        f"trainer.max_steps={steps}",
        f"trainer.val_every={steps}",
        f"seed={seed}",
        f"hydra.run.dir={folder}",
        *WAYS[way],
    ]
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *overrides, "trainer.headless=true"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    seconds = time.perf_counter() - began
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "way": way,
        "seed": seed,
        "seconds": seconds,
        "alike": summary["val/bpb"],
        "alone": alone(load_run(str(folder), torch.device("cpu")), config),
    }


@torch.inference_mode()
def alone(run: LoadedRun, config: DataConfig) -> float:
    """Bits per byte where each held-out function is read without any before it."""
    prepared = prepare(config)
    (windows,) = val_windows(prepared, config.model_copy(update={"packing": True, "isolate": True}))
    nats = 0.0
    for first in range(0, windows.numbers, BATCH):
        rows = windows.rows(np.arange(first, min(first + BATCH, windows.numbers)))
        assert rows.doc_ids is not None
        ids, targets, doc_ids = (torch.from_numpy(array) for array in (rows.ids, rows.targets, rows.doc_ids))
        nats += float(run.model(ids, doc_ids=doc_ids, targets=targets).loss_sum)
    return nats / math.log(2) / prepared.parts[0].val.text_bytes


def facts(config: DataConfig) -> str:
    """What the corpus is: documents, tokens, and how full its packed windows are."""
    prepared = prepare(config)
    train, packed = prepared.parts[0].train, packed_documents(prepared, SEQ_LEN)
    return (
        f"{train.documents:,} training functions, {len(train.stream):,} tokens"
        f" ({len(train.stream) / train.documents:.0f} each); packed into {packed.windows:,} windows of {SEQ_LEN},"
        f" {packed.efficiency:.1%} full."
    )


def report(results: list[dict], about: str, command: str) -> str:
    lines = [
        f"`{command}`",
        "",
        about,
        "",
        "| windows | bits per byte, in windows of the same kind | bits per byte, each separately | seconds a run |",
        "|---|---|---|---|",
    ]
    for way in WAYS:
        mine = [result for result in results if result["way"] == way]
        cells = [" ".join(f"{result[measure]:.4f}" for result in mine) for measure in ("alike", "alone")]
        lines.append(
            f"| {way} | {cells[0]} | {cells[1]} | {statistics.median(result['seconds'] for result in mine):.0f} |"
        )
    return "\n".join([*lines, "", "One figure for each seed."]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="runs of each way")
    parser.add_argument("--steps", type=int, default=80, help="optimizer steps of a run")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of results.md and results.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        corpus = work / "functions.jsonl"
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in functions(work)), encoding="utf-8")
        results = []
        for seed in range(arguments.seeds):
            for way in WAYS:
                results.append(train(way, seed, corpus, arguments.steps, work))
                print(results[-1], flush=True)
        about = facts(compose_config(["data=files", f"data.path={corpus}", f"data.out={work / 'data'}"]).data)
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = report(results, about, " ".join(["python experiments/packing/run.py", *sys.argv[1:]]))
    (arguments.out / "results.md").write_text(text, encoding="utf-8")
    (arguments.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print("\n" + text)


if __name__ == "__main__":
    main()
