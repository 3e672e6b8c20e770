"""Does a Mamba cost grow linearly with the length? Time and memory per token of a training step, from 512 to 8192
tokens a sequence.

Stacks of 8 layers, d_model 256, 4096 ids, fp32, fused AdamW, 2 threads. 16 x 512 tokens, 4 x 2048 and 1 x 8192 are the
same number of tokens; one model steps them in turn, and a ratio is that of two lengths in the same round. Memory is the
peak of the allocator's events during forward and backward of one sequence: were it more than linear, its bytes per
token would grow.

python benchmarks/scaling.py [--only NAME] [--rounds N]      prints the tables and writes
benchmarks/results/scaling_NAME.md
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from harness import ours
from harness.memory import peak_bytes
from harness.report import BOUNDS, bound_row, run, table
from harness.step import Step
from harness.turns import Ratio, take_turns

from hybridlm.model.lm import HybridLM

SHAPES = ((16, 512), (4, 2048), (1, 8192))
LENGTHS = (2048, 4096, 8192)  # of the one sequence whose memory is counted
BOUND = 1.15  # of time and of memory per token


def _label(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]}"


def measure(build: Callable[[], HybridLM], rounds: int) -> list[str]:
    model = build()
    steps = {_label(shape): Step(model, shape) for shape in SHAPES}
    times = take_turns(steps, rounds)
    short, *longer = steps
    bounds = [
        bound_row(f"time, {label} / {short}", times.ratio(label, short), BOUND, BOUND, "less") for label in longer
    ]
    per_token = {}
    for length in LENGTHS:
        step = Step(model, (1, length))
        step.optimizer.zero_grad()
        per_token[length] = peak_bytes(lambda step=step: step.loss().backward()) / length
    first, *others = LENGTHS
    for length in others:
        grown = Ratio.of([per_token[length] / per_token[first]])
        bounds.append(bound_row(f"peak memory per token, 1 x {length} / 1 x {first}", grown, BOUND, BOUND, "less"))
    return [
        f"{rounds} rounds",
        "",
        *table(BOUNDS, bounds),
        "",
        *table(
            ("tokens a step", "median microseconds a token"),
            [[s, f"{1e6 * times.median(s) / steps[s].ids.numel():.0f}"] for s in steps],
        ),
        "",
        *table(
            ("one sequence of", "peak kB a token"),
            [[str(length), f"{per_token[length] / 1e3:.1f}"] for length in LENGTHS],
        ),
    ]


if __name__ == "__main__":
    run("scaling", __doc__, {name: partial(measure, build) for name, build in ours.MAMBAS.items()})
