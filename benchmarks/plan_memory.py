"""The planned peak of a training step beside the real one, for twelve random models of every kind of layer, on the CPU.

"Allocated" sums the events of torch's allocator during a step with the run's own optimizer, everything that stays included: it does not
vary. "Resident" is what a fresh process grew by from before the model was built to the most it ever held, the median of several; it also
has what libraries take past torch, and pages that the C library keeps.

python benchmarks/plan_memory.py [--rounds N]      N processes for each resident size; prints the table, writes results/plan_memory.md
"""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch
from harness.memory import peak_resident_bytes, resident_bytes
from harness.planned import RealStep, random_config, random_cut
from harness.report import run, table

from hybridlm.config.run import RunConfig
from hybridlm.hardware.profiles import planned_device
from hybridlm.memory.plan import step_peak, workload_of
from hybridlm.memory.timeline import Cut
from hybridlm.memory.workload import Workload

SEEDS = range(12)
ALLOCATED, RESIDENT = 0.08, 0.25  # how far a plan may be off
HEADER = ("pattern", "optimizer, precision, step", "planned MB", "allocated MB", "planned / allocated", "resident MB", "planned / resident")


def drawn(seed: int) -> tuple[RunConfig, Workload, Cut]:
    """Large enough for a step of 50 to 500 MB."""
    config = random_config(seed)
    return config, workload_of(config, planned_device(config.hardware))[0], random_cut(seed)


def allocated(seed: int, threads: int) -> int:
    torch.set_num_threads(threads)
    _, work, cut = drawn(seed)
    return RealStep(work, cut).peak()


def resident(seed: int, threads: int) -> int:
    torch.set_num_threads(threads)
    _, work, cut = drawn(seed)
    warm = torch.randn(256, 256, requires_grad=True)
    (warm @ warm).sum().backward()  # libraries load on first use
    before = resident_bytes()
    step = RealStep(work, cut)
    for _ in range(3):
        step()
    return peak_resident_bytes() - before


def _fresh(function: Callable[[int, int], int], seed: int, processes: int) -> list[int]:
    """The function's results in so many processes, each of which does nothing else."""
    context = multiprocessing.get_context("spawn")
    results = []
    for _ in range(processes):
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            results.append(pool.submit(function, seed, torch.get_num_threads()).result())
    return results


def measure(processes: int) -> list[str]:
    rows, off_allocated, off_resident = [], [], []
    for seed in SEEDS:
        config, work, cut = drawn(seed)
        planned = step_peak(config, cut).bytes
        real = _fresh(allocated, seed, 1)[0]
        grown = int(statistics.median(_fresh(resident, seed, processes)))
        off_allocated.append(abs(planned / real - 1))
        off_resident.append(abs(planned / grown - 1))
        setting = f"{config.optim.name}, {work.precision}, {cut.batch_size} x {cut.accumulate} x {work.seq_len}"
        setting += f", checkpointed 1 in {cut.checkpoint_blocks}" if cut.checkpoint_blocks else ""
        sizes = (f"{planned / 1e6:.1f}", f"{real / 1e6:.1f}", f"{planned / real:.4f}", f"{grown / 1e6:.1f}", f"{planned / grown:.3f}")
        rows.append([str(config.model.pattern), setting, *sizes])
    return [
        f"Worst of {len(SEEDS)}: {max(off_allocated):.1%} off what was allocated (bar: {ALLOCATED:.0%}), {max(off_resident):.1%} off the "
        f"resident growth (bar: {RESIDENT:.0%}); {processes} processes for each resident size.",
        "",
        *table(HEADER, rows),
    ]


if __name__ == "__main__":
    run("plan_memory", __doc__, {"steps": measure}, rounds=3, least=3)
