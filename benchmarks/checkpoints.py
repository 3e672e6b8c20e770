"""What writing checkpoints in the background (trainer.async_checkpoints) saves a model of 600M parameters.

A state of fp32 weights and AdamW moments is saved by training itself and by a thread; one of PART of the model's is
measured and scaled, so that it fits small machines. Its seconds are held against the time between two checkpoints on a
consumer card: `trainer.ckpt_every` steps at the speed that `hybridlm plan` estimates.

python benchmarks/checkpoints.py [--rounds N]      prints the table and writes benchmarks/results/checkpoints.md
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch
from harness.report import run, table

from hybridlm.cli.compose import compose_config
from hybridlm.memory.plan import plan_run
from hybridlm.train.checkpoints import AtomicCheckpointIO, BackgroundCheckpointIO

PARAMETERS, PART, TENSORS = 600_000_000, 0.2, 100
CARDS = ("rtx4080", "rtx4090", "rtx5090")
MODEL = ["model=transformer", "size=d20", "optim=adamw"]  # 561M parameters
SETTINGS = ((100, "the default"), (1000, "ten times that"))  # steps between checkpoints


def _seconds(rounds: int) -> dict[str, list[float]]:
    """For which training stops at a save."""
    numbers = int(PARAMETERS * PART / TENSORS)
    state = {
        part: {str(i): torch.randn(numbers) for i in range(TENSORS)} for part in ("weights", "exp_avg", "exp_avg_sq")
    }
    writers = {"training": AtomicCheckpointIO(), "a thread": BackgroundCheckpointIO(AtomicCheckpointIO())}
    found: dict[str, list[float]] = {name: [] for name in writers}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for name, writer in writers.items():
                began = time.perf_counter()
                writer.save_checkpoint(state, Path(folder) / "a.ckpt")
                found[name].append((time.perf_counter() - began) / PART)
                writer.teardown()
    return found


def measure(rounds: int) -> list[str]:
    seconds = _seconds(rounds)
    gigabytes = 12 * PARAMETERS / 1e9
    lines = [
        f"{gigabytes:.1f} GB of state, scaled from {gigabytes * PART:.1f} GB; {rounds} rounds",
        "",
        *table(
            ("written by", "training stops for, s: median [min, max]", "GB/s"),
            [
                [
                    name,
                    f"{statistics.median(times):.1f} [{min(times):.1f}, {max(times):.1f}]",
                    f"{gigabytes / statistics.median(times):.2f}",
                ]
                for name, times in seconds.items()
            ],
        ),
        "",
    ]
    own, thread = (statistics.median(times) for times in seconds.values())
    rows = []
    for card in CARDS:
        plan = plan_run(compose_config([*MODEL, f"hardware={card}"]))
        if not plan.fits or plan.tokens_per_s is None:
            continue
        for steps, what in SETTINGS:
            between = steps * plan.tokens / plan.max_steps / plan.tokens_per_s
            saved = (own - thread) / (between + own)
            rows.append([card, f"{plan.tokens_per_s:,.0f}", f"{steps} ({what})", f"{between:,.0f}", f"{saved:.1%}"])
    header = (
        "card",
        "tokens/s, estimated",
        "steps between checkpoints",
        "seconds between them",
        "time saved by the thread",
    )
    return [*lines, *table(header, rows)]


if __name__ == "__main__":
    run("checkpoints", __doc__, {"background": measure}, rounds=5, least=5)
