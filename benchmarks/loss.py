"""Linear layer and cross-entropy at a vocabulary of 32768: hybridlm's, in chunks of rows, against torch's own two
functions.

Forward and backward of 2048 rows of 256 channels, fp32. Time: the two in turn, the ratio inside each round. Peak
memory: the allocator's events, above the inputs.

python benchmarks/loss.py [--rounds N]      prints the table and writes benchmarks/results/loss.md
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from harness.memory import peak_bytes
from harness.report import BOUNDS, bound_row, run, table
from harness.turns import Ratio, take_turns
from torch import Tensor

from hybridlm.ops.cross_entropy import linear_cross_entropy

ROWS, D_MODEL, VOCAB = 2048, 256, 32768


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, targets, vocab=VOCAB) / ROWS


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), targets)


def measure(rounds: int) -> list[str]:
    targets = torch.randint(VOCAB, (ROWS,))
    leaves = [torch.randn(ROWS, D_MODEL).requires_grad_(), (0.02 * torch.randn(VOCAB, D_MODEL)).requires_grad_()]
    losses = {"hybridlm": ours, "plain": plain}
    steps = {
        name: partial(lambda loss: torch.autograd.grad(loss(*leaves, targets), leaves), loss)
        for name, loss in losses.items()
    }
    times = take_turns(steps, rounds)
    peaks = {name: peak_bytes(step) for name, step in steps.items()}
    memory = Ratio.of([peaks["hybridlm"] / peaks["plain"]])
    bounds = [
        bound_row("time, hybridlm / plain", times.ratio("hybridlm", "plain"), 0.77, 0.77, "less"),
        bound_row("peak memory, hybridlm / plain", memory, 0.45, 0.45, "less"),
    ]
    each = [[name, f"{1e3 * times.median(name):.0f}", f"{peaks[name] / 1e6:.0f}"] for name in losses]
    return [
        f"{ROWS} rows, D {D_MODEL}, V {VOCAB}, {rounds} rounds",
        "",
        *table(BOUNDS, bounds),
        "",
        *table(("loss", "median ms", "peak MB"), each),
    ]


if __name__ == "__main__":
    run("loss", __doc__, {"cross-entropy": measure})
