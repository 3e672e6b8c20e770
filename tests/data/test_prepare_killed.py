"""`hybridlm prepare` on a corpus of a size that people have, killed for good at random moments."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hybridlm.data.tokenizer import train_bpe

SIZE = 200_000_000


def write_corpus(path: Path) -> list[str]:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(5000)]
    texts = [" ".join(rng.choices(words, k=rng.randint(50, 500))) for _ in range(4000)]
    written, number = 0, 0
    with path.open("wb") as file:
        while written < SIZE:
            number += 1
            text = f"{number}: {rng.choice(texts)} {rng.choice(texts)}"
            written += file.write(b"{cut off\n" if number % 100 == 0 else json.dumps({"text": text}).encode() + b"\n")
    return texts


def prepare(folder: Path, out: str) -> subprocess.Popen[str]:
    overrides = ["data=files", f"data.path={folder}/texts.jsonl", f"data.out={folder / out}", "data.prepare_workers=2"]
    overrides += ["data.tokenizer.kind=file", f"data.tokenizer.path={folder}/tokenizer.json"]
    return subprocess.Popen(
        [sys.executable, "-m", "hybridlm", "prepare", *overrides], stdout=subprocess.PIPE, text=True
    )


def files_of(out: Path) -> dict[str, bytes]:
    (folder,) = out.glob("files-*")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "verified.json"}


@pytest.mark.slow
def test_killed_at_random_moments_prepare_gives_the_same_files(tmp_path):
    train_bpe(write_corpus(tmp_path / "texts.jsonl"), 8192).save(tmp_path / "tokenizer.json")
    began = time.monotonic()
    whole = prepare(tmp_path, "whole")
    print(whole.communicate()[0])
    assert whole.returncode == 0
    took = time.monotonic() - began
    rng = random.Random(time.time_ns())  # other moments every time
    for number in range(3):
        moment = rng.uniform(0.15, 0.4) * took
        process = prepare(tmp_path, "killed")
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        done = len(list((tmp_path / "killed").glob(".files-*.unfinished/unit-*.json")))
        print(f"kill {number}: after {moment:.1f} of {took:.1f} s; finished pieces: {done}")
    last = prepare(tmp_path, "killed")
    print(last.communicate()[0])
    assert last.returncode == 0
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
