"""The planned peak of a training step beside the real one, for twelve random models of every kind of layer, on the CPU.

"Allocated" sums the events of torch's allocator during a step with the run's own optimizer, everything that stays
included: it does not vary. "Resident" is what a fresh process grew by from a small model's step to the most it ever
held, the median of several, with the C library told to give every large block back (MALLOC_MMAP_THRESHOLD_). "By
default" it keeps freed blocks below 32 MiB; the plan's margin is for that. All in float32, which a CPU trains in unless
told otherwise; tests/memory compares other precisions with what is allocated.

python benchmarks/plan_memory.py [--rounds N]      N processes for each resident size; prints the table, writes
results/plan_memory.md
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from unittest import mock

import torch
from harness.memory import peak_resident_bytes, resident_bytes
from harness.planned import RealStep, random_config, random_step
from harness.report import run, table

from hybridlm.config.run import RunConfig
from hybridlm.memory.plan import Planner
from hybridlm.memory.timeline import StepSettings

SEEDS, PRECISION = range(12), "trainer.precision=32-true"
ALLOCATED, RESIDENT = 0.08, 0.25  # how far a plan may be off
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "131072"}  # glibc's first value, which it otherwise raises as blocks are freed
HEADER = (
    "pattern",
    "optimizer, step",
    "planned MB",
    "allocated MB",
    "planned / allocated",
    "resident MB",
    "planned / resident",
    "by default MB",
    "with margin / by default",
)


def drawn(seed: int) -> tuple[RunConfig, Planner, StepSettings]:
    """Large enough for a step of 50 to 500 MB."""
    config = random_config(seed, PRECISION)
    return config, Planner(config), random_step(seed)


def allocated(seed: int, threads: int) -> int:
    torch.set_num_threads(threads)
    _, planner, settings = drawn(seed)
    return RealStep(planner.steps.work, settings).peak()


def resident(seed: int, threads: int) -> int:
    torch.set_num_threads(threads)
    _, planner, settings = drawn(seed)
    small = random_config(seed, PRECISION, "model.d_model=64", "data.seq_len=32", "data.tokenizer.vocab_size=512")
    RealStep(Planner(small).steps.work, replace(settings, batch_size=1, accumulate=1))()  # libraries load
    before = resident_bytes()
    step = RealStep(planner.steps.work, settings)
    for _ in range(3):
        step()
    return peak_resident_bytes() - before


def _fresh(
    function: Callable[[int, int], int], seed: int, processes: int, environment: Mapping[str, str] | None = None
) -> int:
    """The median of the function's results in so many processes, each of which does nothing else."""
    context = multiprocessing.get_context("spawn")
    results = []
    with mock.patch.dict(os.environ, environment or {}):
        for _ in range(processes):
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                results.append(pool.submit(function, seed, torch.get_num_threads()).result())
    return int(statistics.median(results))


def measure(processes: int) -> list[str]:
    rows, off = [], []
    for seed in SEEDS:
        config, planner, step = drawn(seed)
        planned = planner.steps.peak(step).bytes
        real, held = _fresh(allocated, seed, 1), _fresh(resident, seed, processes, RETURNING)
        kept, margin = _fresh(resident, seed, processes), planner.limit.reserved(planned)
        off.append((abs(planned / real - 1), abs(planned / held - 1), margin / kept))
        setting = f"{config.optim.name}, {step.batch_size} x {step.accumulate} x {config.data.seq_len}"
        setting += f", checkpointed 1 in {step.checkpoint_blocks}" if step.checkpoint_blocks else ""
        sizes = [
            f"{planned / 1e6:.1f}",
            f"{real / 1e6:.1f}",
            f"{planned / real:.4f}",
            f"{held / 1e6:.1f}",
            f"{planned / held:.3f}",
        ]
        rows.append([str(config.model.pattern), setting, *sizes, f"{kept / 1e6:.1f}", f"{margin / kept:.3f}"])
    of_real, of_held, of_kept = zip(*off, strict=True)
    return [
        (
            f"Worst of {len(SEEDS)}: {max(of_real):.2%} off what was allocated (bar: {ALLOCATED:.0%}),"
            f" {max(of_held):.1%} off the resident growth (bar: {RESIDENT:.0%}); with its margin at least"
            f" {min(of_kept):.2f} times what is resident by default. {processes} processes for each resident size."
        ),
        "",
        *table(HEADER, rows),
    ]


if __name__ == "__main__":
    run("plan_memory", __doc__, {"steps": measure}, rounds=3, least=3)
