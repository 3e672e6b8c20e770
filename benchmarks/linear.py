"""The projection of one token by a weight that is not in cache, as decoding meets it: hybridlm.ops.linear against
torch's own.

fp32; so many weights of each shape that they exceed a third-level cache, read in turn.

python benchmarks/linear.py [--rounds N]      prints the tables and writes benchmarks/results/linear.md
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import torch
import torch.nn.functional as F
from harness.report import run, table
from harness.turns import take_turns
from torch import Tensor

from hybridlm.ops.linear import linear

SHAPES = ((4096, 256), (1160, 256), (704, 256), (256, 704), (256, 256), (3072, 768), (768, 3072))  # outputs, inputs
BYTES = 128_000_000  # of all weights of a shape
CALLS = 50  # in a round


def _in_turn(function: Callable[[Tensor, Tensor], Tensor], weights: list[Tensor], x: Tensor) -> Callable[[], object]:
    turns = cycle(weights)
    return lambda: function(x, next(turns))


@torch.inference_mode()
def _row(outputs: int, inputs: int, rounds: int) -> list[str]:
    weights = [torch.randn(outputs, inputs) for _ in range(-(-BYTES // (4 * outputs * inputs)))]
    x = torch.randn(1, 1, inputs)
    half = len(weights) // 2  # the two must not find in cache what the other has just read
    contenders = {
        "torch": _in_turn(F.linear, weights, x),
        "hybridlm": _in_turn(linear, weights[half:] + weights[:half], x),
    }
    times = take_turns(contenders, rounds, CALLS)
    rates = [4 * outputs * inputs * CALLS / times.median(name) / 1e9 for name in ("torch", "hybridlm")]
    return [f"{outputs} x {inputs}", *(f"{rate:.1f}" for rate in rates), str(times.ratio("torch", "hybridlm"))]


def measure(rounds: int) -> list[str]:
    """With one thread, then with all that were asked for."""
    lines = [f"one token, {rounds} rounds of {CALLS} calls"]
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        rows = [_row(*shape, rounds) for shape in SHAPES]
        header = (
            "weight",
            "torch, GB/s",
            "hybridlm, GB/s",
            "time of torch / hybridlm: median [min, max] of the rounds",
        )
        lines += ["", f"{threads} thread{'s' * (threads > 1)}:", "", *table(header, rows)]
    return lines


if __name__ == "__main__":
    run("linear", __doc__, {"one-token": measure})
