"""A run of a small random model, and a server of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from small_models import small_config

from hybridlm.config.mixers.attention import AttentionConfig
from hybridlm.config.mixers.mamba2 import Mamba2Config
from hybridlm.data.chat import template_of
from hybridlm.data.tokenizer import byte_tokenizer
from hybridlm.files.sealed import write_sealed
from hybridlm.model.build import fresh_model
from hybridlm.runs.checkpoint import KEY, LoadedRun, facts, load_run
from hybridlm.serve.command import served
from hybridlm.serve.limits import Limits
from hybridlm.serve.server import Server, listening

SPECIALS = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


def write_run(folder: Path, *, chat: bool = True, d_model: int = 32) -> Path:
    """The file of weights of a run whose model says every letter about as often."""
    folder.mkdir(parents=True)
    tokenizer = byte_tokenizer(SPECIALS if chat else ())
    config = small_config(
        "MTM",
        d_model=d_model,
        attention=AttentionConfig(n_heads=2, rope=True),
        mamba2=Mamba2Config(d_state=8, head_dim=16, chunk=16),
    )
    model = fresh_model(config, tokenizer.vocab_size, seed=0, device="cpu")
    with torch.no_grad():  # logits far enough apart to be those of a trained model
        model.embedding.weight.mul_(20)
    if chat:
        template_of(tokenizer).save(folder)
    tokenizer.save(folder / "tokenizer.json")
    (folder / "config.yaml").write_text("data: {seq_len: 512}\n")
    content = {**facts(config, tokenizer.vocab_size, tokenizer.fingerprint, 1), "step": 7}
    path = folder / "weights.safetensors"
    write_sealed(path, KEY, content, {name: each.contiguous() for name, each in model.state_dict().items()})
    return path


def loaded(path: Path) -> LoadedRun:
    return load_run(str(path), torch.device("cpu"))


@contextmanager
def serving(path: Path, *, keys=(), hosts=(), origins=(), **limits) -> Iterator[str]:
    """The address of a server in this process."""
    app, guard = served(loaded(path), Limits(**{"context": 512} | limits), keys, hosts, origins)
    with listening("127.0.0.1", 0) as sock:
        server = Server(app, guard)
        thread = threading.Thread(target=server.run, args=([sock],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


class Process:
    """A server in a process of its own; ended at the end of ``with``."""

    def __init__(self, path: Path, *options: str, **environment: str) -> None:
        command = [sys.executable, "-m", "hybridlm", "serve", str(path), "--port", "0", *options]
        given = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=given)
        assert self.process.stdout is not None
        greeting = self.process.stdout.readline()
        found = re.search(r"http://\S+:\d+", greeting)
        assert found, greeting + self.process.communicate()[1]
        self.url = found[0]

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def resident(self) -> int:
        """Bytes."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


def wait_until(condition, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
