"""A server's speed under many clients against one client's, and what a kept prefix saves.

`hybridlm serve` runs in a process of its own, its clients here, on the same cores: d_model 256, 8 layers, Mamba-2 and
attention in turn, 4096 ids, fp32. Every answer is streamed, at temperature 0.8, after a prompt of 128 tokens that no
other request begins with, and has 64 to 192 tokens.

load: in each round one client asks for some answers one after the other, then 50 clients ask for three each, beginning
within four seconds; the first tokens of a client's first answer, when all begin, do not count. prefix: in each round
two prompts of 1,000 equal tokens and 24 of their own, the first of which nobody sent before.

python benchmarks/serve.py [--only load|prefix] [--rounds N]      prints the tables and writes
benchmarks/results/serve_*.md
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import ours
from harness.report import BOUNDS, bound_row, run, table
from harness.texts import write_lines
from harness.turns import Ratio

from hybridlm.data.tokenizer import train_bpe
from hybridlm.files.sealed import write_sealed
from hybridlm.runs.checkpoint import KEY, facts

CLIENTS, EACH, LONE = 50, 3, 4  # clients, answers of each; answers of the lone client
PROMPT, PREFIX, OWN = 128, 1000, 24  # tokens
ANSWER = (64, 192)  # tokens
START = 4.0  # seconds within which the clients begin
ROUNDS = 5


@dataclass(frozen=True)
class Timing:
    first: float  # seconds to the first token
    whole: float  # to the last one
    tokens: int


def write_run(folder: Path) -> Path:
    """A run with drawn weights, whose choices are about as open as a trained model's."""
    write_lines(folder / "texts.jsonl", 2_000_000)
    lines = (folder / "texts.jsonl").read_text().splitlines()
    tokenizer = train_bpe((json.loads(line)["text"] for line in lines), ours.VOCAB)
    tokenizer.save(folder / "tokenizer.json")
    model = ours.hybrid()
    with torch.no_grad():
        model.embedding.weight.mul_(8)
    (folder / "config.yaml").write_text("data: {seq_len: 2048}\n")
    path = folder / "weights.safetensors"
    content = {**facts(model.config, model.vocab_size, tokenizer.fingerprint, 1), "step": 0}
    write_sealed(path, KEY, content, {name: each.contiguous() for name, each in model.state_dict().items()})
    return path


@contextmanager
def server() -> Iterator[int]:
    """The port of a server."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "hybridlm", "serve", str(write_run(Path(folder))), "--port", "0"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            found = re.search(r":(\d+) \(API", process.stdout.readline())
            assert found is not None, "the server did not start"
            yield int(found[1])
        finally:
            process.terminate()
            process.wait()


async def ask(port: int, prompt: list[int], rng: random.Random, tokens: int) -> Timing:
    """One streamed answer; the connection is closed behind it, as ``curl`` does."""
    body = json.dumps(
        {
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0.8,
            "seed": rng.randrange(2**30),
            "stream": True,
            "logprobs": 0,  # so that every token is an event, also one that does not complete a character
            "logit_bias": {"0": -100},  # no answer ends early
        }
    ).encode()
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"connection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    first, count = 0.0, 0
    async for line in reader:
        if line.startswith(b'data: {"id"'):
            count += 1
            first = first or time.perf_counter() - began
    writer.close()
    assert count == tokens, f"{count} tokens of {tokens}"
    return Timing(first, time.perf_counter() - began, count)


def drawn(rng: random.Random, tokens: int) -> list[int]:
    return [rng.randrange(1, ours.VOCAB) for _ in range(tokens)]


async def lone(port: int, rng: random.Random) -> tuple[float, float]:
    """Tokens a second and the median seconds to a first token, one answer at a time."""
    began = time.perf_counter()
    timings = [await ask(port, drawn(rng, PROMPT), rng, rng.randint(*ANSWER)) for _ in range(LONE)]
    seconds = time.perf_counter() - began
    return sum(each.tokens for each in timings) / seconds, statistics.median(each.first for each in timings)


async def crowd(port: int, rng: random.Random) -> tuple[float, float]:
    """The same of all clients together."""

    async def client(start: float, own: random.Random) -> list[Timing]:
        await asyncio.sleep(start)
        return [await ask(port, drawn(own, PROMPT), own, own.randint(*ANSWER)) for _ in range(EACH)]

    began = time.perf_counter()
    clients = [client(START * rng.random(), random.Random(rng.randrange(2**30))) for _ in range(CLIENTS)]
    timings = await asyncio.gather(*clients)
    seconds = time.perf_counter() - began
    tokens = sum(each.tokens for own in timings for each in own)
    return tokens / seconds, statistics.median(each.first for own in timings for each in own[1:])


def load(rounds: int) -> list[str]:
    rng = random.Random(0)
    results = []
    with server() as port:
        for number in range(rounds + 1):  # the first one is for the server to allocate its memory
            pair = asyncio.run(lone(port, rng)), asyncio.run(crowd(port, rng))
            results += [pair] if number else []
    speed = Ratio.of([many[0] / one[0] for one, many in results])
    first = Ratio.of([many[1] / one[1] for one, many in results])
    rows = [
        bound_row(f"tokens a second, {CLIENTS} clients / one", speed, 4.0, 6.0, "more"),
        bound_row(f"first token, median of {CLIENTS} clients / of one", first, 2.0, 1.5, "less"),
    ]
    each = [
        [
            name,
            f"{statistics.median(r[place][0] for r in results):.0f}",
            f"{1e3 * statistics.median(r[place][1] for r in results):.0f}",
        ]
        for place, name in enumerate(("one client", f"{CLIENTS} clients"))
    ]
    return [*table(BOUNDS, rows), "", *table(("", "tokens/s", "ms to the first token"), each)]


def prefix(rounds: int) -> list[str]:
    rng, pairs = random.Random(0), []
    with server() as port:
        for number in range(rounds + 1):
            shared = drawn(rng, PREFIX)
            times = [asyncio.run(ask(port, shared + drawn(rng, OWN), rng, 1)).first for _ in range(2)]
            pairs += [times] if number else []
    ratio = Ratio.of([first / second for first, second in pairs])
    rows = [bound_row(f"first token after {PREFIX:,} equal tokens, first time / second time", ratio, 5.0, 8.0, "more")]
    each = [
        [name, f"{1e3 * statistics.median(pair[i] for pair in pairs):.0f}"]
        for i, name in enumerate(("first", "second"))
    ]
    return [*table(BOUNDS, rows), "", *table(("time", "ms to the first token"), each)]


if __name__ == "__main__":
    run("serve", __doc__, {"load": load, "prefix": prefix}, rounds=ROUNDS, least=ROUNDS)
