"""A corpus and a configuration so small that a whole run takes a second."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from hybridlm.data.tokenizer import byte_tokenizer

ROOT = Path(__file__).resolve().parent.parent

torch.set_num_threads(1)  # the tensors of the tests are too small to share
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # nohup and `&` in a script pass this on to every child process
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty small text files with something to learn in them; beside them lines of JSON, a tokenizer and a token
    file."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(20):
        lines = [f"def f{j}(x):\n    return x * {j} + {i}\n" for j in range(i + 20)]
        (folder / f"{i:02d}.txt").write_text("\n".join(lines), encoding="utf-8")
    records = [{"text": f"def g{i}():\n    return {i} * {i}\n" * 9, "body": f"g{i} " * 30} for i in range(40)]
    (folder / "lines.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records) + "{cut off", encoding="utf-8"
    )
    for name, size in (
        ("train", 40),
        ("test", 30),
        ("other", 20),
    ):  # what the library datasets reads, with two configurations
        path = folder / f"hub/{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in records[:size]), encoding="utf-8")
    (folder / "hub/README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: [{split: train, path: train.jsonl}, {split: test, path:"
        " test.jsonl}]\n- config_name: other\n  data_files: other.jsonl\n---\n",
        encoding="utf-8",
    )
    long = [{"text": f"{chr(97 + i)}{chr(98 + i // 2)} " * 20_000} for i in range(20)]  # 1.2 MB
    (folder / "long.jsonl").write_text("".join(json.dumps(record) + "\n" for record in long), encoding="utf-8")
    chats = [{"prompt": f"say {i}", "response": f"{i} is what I say, {i} " * 3} for i in range(40)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in chats), encoding="utf-8")
    byte_tokenizer().save(folder / "tokenizer.json")
    np.tile(np.arange(257, dtype="<u2"), 40).tofile(folder / "ids.bin")
    return folder


@pytest.fixture(scope="session")
def tiny(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a run of 12 steps: a Mamba-2 and an attention layer, 32 wide, on bytes."""
    return [
        "data=files",
        f"data.path={corpus}/*.txt",
        f"data.out={tmp_path_factory.mktemp('prepared')}",
        "data.tokenizer.kind=bytes",
        "data.val_fraction=0.2",
        "data.seq_len=32",
        "data.val_seq_len=64",
        "data.global_batch=4",
        "model.d_model=32",
        "model.n_layers=null",
        "model.pattern=MT",
        "model.attention.n_heads=2",
        "model.attention.n_kv_heads=null",
        "model.attention.head_dim=null",
        "model.mamba2.head_dim=16",
        "model.mamba2.d_state=8",
        "model.mamba2.chunk=16",
        "model.mlp.d_ff=48",
        "hardware=cpu",
        "trainer.max_steps=12",
        "trainer.log_every=2",
        "trainer.val_every=4",
        "trainer.val_batches=null",
        "trainer.ckpt_every=4",
        "callbacks.samples.tokens=8",
    ]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """The environment of a subprocess that trains: one thread, its own cache, no terminal."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HYBRIDLM_CACHE": str(tmp_path / "cache"), "WANDB_MODE": "disabled"}
