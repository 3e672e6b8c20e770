"""Activation memory of a training step, hybridlm's models beside those of Hugging Face transformers.

4 x 512 tokens, d_model 256, 8 layers, 4096 ids, fp32, 2 threads. Each number is taken in a fresh process and is what
forward and backward need above weights and optimizer state at their peak, gradients included. "Allocated" sums the
events of torch's allocator, which does not vary; "resident" is the growth of the process's largest resident size, which
also holds what libraries take past torch.

python benchmarks/memory.py [--rounds N]      N processes for each resident size; prints the table and writes
benchmarks/results/memory.md
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch
from harness import ours, peers
from harness.memory import peak_bytes, peak_resident_bytes, resident_bytes
from harness.report import BOUNDS, bound_row, run, table
from harness.step import Step
from harness.turns import Ratio
from torch import nn

SHAPE = (4, 512)

MAMBA2, HF_MAMBA2 = "hybridlm Mamba-2", "HF Mamba2"
MODELS: dict[str, Callable[[], nn.Module]] = {
    HF_MAMBA2: partial(peers.mamba2, 256),
    "HF Mamba2, chunk 64": partial(peers.mamba2, 64),
    MAMBA2: ours.mamba2,
    "HF Bamba": peers.bamba,
    "hybridlm hybrid": ours.hybrid,
    "HF Llama": peers.llama,
    "hybridlm attention": ours.transformer,
}


def _ready(name: str, threads: int) -> Step:
    """A step whose optimizer has its state already."""
    torch.set_num_threads(threads)
    step = Step(MODELS[name](), SHAPE)
    for parameter in step.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step.optimizer.step()
    step.optimizer.zero_grad()
    return step


def allocated(name: str, threads: int) -> int:
    step = _ready(name, threads)
    return peak_bytes(lambda: step.loss().backward())


def resident(name: str, threads: int) -> int:
    step = _ready(name, threads)
    before = resident_bytes()
    step.loss().backward()
    return peak_resident_bytes() - before


def _fresh(function: Callable[[str, int], int], name: str, processes: int) -> list[int]:
    """The function's results in so many processes, each of which does nothing else."""
    context = multiprocessing.get_context("spawn")
    results = []
    for _ in range(
        processes
    ):  # a pool for each: a pool that replaces its worker after every task can wait for ever in Python 3.11
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            results.append(pool.submit(function, name, torch.get_num_threads()).result())
    return results


def _ratio(ours_bytes: Sequence[int], peer_bytes: Sequence[int]) -> Ratio:
    return Ratio.of([a / b for a, b in zip(ours_bytes, peer_bytes, strict=True)])


def measure(processes: int) -> list[str]:
    exact = {name: _fresh(allocated, name, 1) for name in MODELS}
    process = {name: _fresh(resident, name, processes) for name in MODELS}
    bounds = [
        bound_row(f"{what}, {MAMBA2} / {HF_MAMBA2}", _ratio(numbers[MAMBA2], numbers[HF_MAMBA2]), 0.45, 0.35, "less")
        for what, numbers in (("allocated", exact), ("resident", process))
    ]
    each = [
        [name, f"{exact[name][0] / 1e6:.0f}", f"{Ratio.of([size / 1e6 for size in process[name]]).median:.0f}"]
        for name in MODELS
    ]
    return [
        f"{SHAPE[0]} x {SHAPE[1]} tokens, {processes} processes for each resident size",
        "",
        *table(BOUNDS, bounds),
        "",
        *table(("model", "allocated MB", "resident MB"), each),
    ]


if __name__ == "__main__":
    run("memory", __doc__, {"activations": measure}, rounds=3, least=3)
