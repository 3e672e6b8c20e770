"""Time of a training step, hybridlm's models beside those of Hugging Face transformers.

d_model 256, 8 layers, 4096 ids, fp32, fused AdamW, 2 threads; 4 x 512 tokens a step, 1 x 2048 where the name says so.
The models of a measurement live in one process and step in turn; a ratio is that of two models' times in the same
round. Models that are compared have the same number of parameters within 5 percent.

python benchmarks/training.py [--only NAME] [--rounds N]      prints the tables and writes
benchmarks/results/training_NAME.md
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from harness import ours, peers
from harness.report import BOUNDS, bound_row, run, table
from harness.step import Step, parameters
from harness.turns import LeftOut, Ratio, Times, take_turns
from torch import nn

from hybridlm.model.count import flops_per_token

SHORT, LONG = (4, 512), (1, 2048)  # sequences, tokens of each
TOLERANCE = 0.05  # of the numbers of parameters that are compared
LLAMA_D_FF = 224  # makes Llama's parameters those of the Mamba-2 stack
PRODUCTS = 10  # matrix products timed in each round

MAMBA2 = "hybridlm Mamba-2"
HF_MAMBA2 = [f"HF Mamba2, chunk {chunk}" for chunk in peers.MAMBA2_CHUNKS]
HF_DEEPSEEK = [f"HF DeepseekV3, experts {way}" for way in peers.EXPERTS]
LLAMA = "HF Llama"


@dataclass(frozen=True)
class Comparison:
    """Time of the fastest of ``slow`` over that of ``fast``; it should be more than the bounds, or less."""

    slow: Sequence[str]
    fast: Sequence[str]
    better: Literal["more", "less"]
    floor: float
    goal: float

    def rows(self, times: Times, counts: Mapping[str, int]) -> list[list[str]]:
        """One row; none where a contender is missing. Raises RuntimeError where the models differ in size."""
        if not all(name in counts for name in (*self.slow, *self.fast)):
            return []
        slow, fast = times.fastest(self.slow), times.fastest(self.fast)
        if max(counts[slow], counts[fast]) > (1 + TOLERANCE) * min(counts[slow], counts[fast]):
            raise RuntimeError(
                f"{slow} has {counts[slow]:,} parameters and {fast} {counts[fast]:,}: more than {TOLERANCE:.0%} apart"
            )
        chosen = {True: " (its fastest)", False: ""}
        label = f"{slow}{chosen[len(self.slow) > 1]} / {fast}{chosen[len(self.fast) > 1]}"
        return [bound_row(label, times.ratio(slow, fast), self.floor, self.goal, self.better)]


@dataclass(frozen=True)
class Measurement:
    """Models by name, what is asked of their times, and the tokens of a step."""

    models: Mapping[str, Callable[[], nn.Module]]
    comparisons: Sequence[Comparison]
    shape: tuple[int, int] = SHORT
    roofline: bool = False  # also hybridlm's Mamba-2 step against the machine's rate of matrix products


def _products(tokens: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of matrices: square ones, and the two projections of a Mamba-2 layer."""
    inner, d_model = 1160, ours.D_MODEL  # 1160 rows of in_proj: [z, x, B, C, dt]
    return {
        "products of 1024 x 1024 x 1024": (torch.randn(1024, 1024), torch.randn(1024, 1024)),
        f"products of {tokens} x {d_model} x {inner} (in_proj)": (
            torch.randn(tokens, d_model),
            torch.randn(d_model, inner),
        ),
        f"products of {tokens} x 512 x {d_model} (out_proj)": (torch.randn(tokens, 512), torch.randn(512, d_model)),
    }


def _multiply(a: torch.Tensor, b: torch.Tensor) -> None:
    for _ in range(PRODUCTS):
        a @ b


def _roofline(times: Times, step: Step, products: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> list[list[str]]:
    """Useful FLOPs of a step over what the machine's products would have done in its time, round by round."""
    useful = flops_per_token(step.model, step.ids.shape[1], "train") * step.ids.numel()
    rows = []
    for name, (a, b) in products.items():
        flops = PRODUCTS * 2 * a.shape[0] * a.shape[1] * b.shape[1]
        pairs = zip(times.seconds[MAMBA2], times.seconds[name], strict=True)
        fraction = Ratio.of([(useful / step_s) / (flops / product_s) for step_s, product_s in pairs])
        label = f"useful FLOP/s of the {MAMBA2} step / FLOP/s of {name}, {flops / times.median(name) / 1e9:.0f} GFLOP/s"
        rows.append(bound_row(label, fraction, 0.45, 0.55, "more"))
    return rows


def measure(measurement: Measurement, rounds: int) -> list[str]:
    """Steps the models in turn and returns two tables: the bounds, and the models themselves."""
    steps, missing = {}, []
    for name, build in measurement.models.items():
        try:
            steps[name] = Step(build(), measurement.shape)
        except LeftOut as reason:
            missing.append(f"{name} is left out: {reason}")
    batch, length = measurement.shape
    products = _products(batch * length) if measurement.roofline and MAMBA2 in steps else {}
    contenders: dict[str, Callable[[], object]] = dict(steps)
    times = take_turns(contenders | {name: partial(_multiply, *pair) for name, pair in products.items()}, rounds)

    counts = {name: parameters(step.model) for name, step in steps.items()}
    bounds = [row for comparison in measurement.comparisons for row in comparison.rows(times, counts)]
    if products:
        bounds += _roofline(times, steps[MAMBA2], products)
    models = [
        [
            name,
            f"{counts[name] / 1e6:.2f}M",
            f"{1e3 * times.median(name):.0f}",
            f"{batch * length / times.median(name):,.0f}",
        ]
        for name in steps
    ]
    return [
        f"{batch} x {length} tokens a step, {rounds} rounds",
        "",
        *table(BOUNDS, bounds),
        "",
        *table(("model", "parameters", "median ms a step", "tokens/s"), models),
        *([""] if missing else []),
        *missing,
    ]


_MAMBA2_AND_PEERS: dict[str, Callable[[], nn.Module]] = {
    **{name: partial(peers.mamba2, chunk) for name, chunk in zip(HF_MAMBA2, peers.MAMBA2_CHUNKS, strict=True)},
    MAMBA2: ours.mamba2,
    LLAMA: partial(peers.llama, LLAMA_D_FF),
}
_OVER_HF_MAMBA2 = [
    Comparison(HF_MAMBA2[:1], [MAMBA2], "more", 2.6, 3.2),
    Comparison(HF_MAMBA2, [MAMBA2], "more", 1.7, 2.2),
]

MEASUREMENTS = {
    "mamba2": Measurement(
        _MAMBA2_AND_PEERS, [*_OVER_HF_MAMBA2, Comparison([MAMBA2], [LLAMA], "less", 1.10, 0.95)], roofline=True
    ),
    "mamba2_2048": Measurement(
        _MAMBA2_AND_PEERS, [*_OVER_HF_MAMBA2, Comparison([MAMBA2], [LLAMA], "less", 0.75, 0.6)], LONG, roofline=True
    ),
    "hybrid": Measurement(
        {"HF Bamba": peers.bamba, "hybridlm hybrid": ours.hybrid},
        [Comparison(["HF Bamba"], ["hybridlm hybrid"], "more", 1.8, 2.2)],
    ),
    "attention": Measurement(
        {"hybridlm attention": ours.transformer, LLAMA: peers.llama},
        [Comparison(["hybridlm attention"], [LLAMA], "less", 1.10, 0.95)],
    ),
    "mamba3": Measurement(
        {MAMBA2: ours.mamba2, "hybridlm Mamba-3 SISO": ours.mamba3, "hybridlm Mamba-3 MIMO, rank 4": ours.mamba3_mimo},
        [
            Comparison(["hybridlm Mamba-3 SISO"], [MAMBA2], "less", 1.3, 1.1),
            Comparison(["hybridlm Mamba-3 MIMO, rank 4"], ["hybridlm Mamba-3 SISO"], "less", 2.0, 1.5),
        ],
    ),
    "mamba1": Measurement(
        {"hybridlm Mamba-1": ours.mamba1, MAMBA2: ours.mamba2, "HF Mamba, mambapy": peers.mamba1},
        [
            Comparison(["hybridlm Mamba-1"], [MAMBA2], "less", 3.2, 2.0),
            Comparison(["HF Mamba, mambapy"], ["hybridlm Mamba-1"], "more", 2.0, 4.0),
        ],
    ),
    "moe": Measurement(
        {
            "hybridlm MLA + MoE": ours.mla_moe,
            **{name: partial(peers.deepseek, way) for name, way in zip(HF_DEEPSEEK, peers.EXPERTS, strict=True)},
        },
        [Comparison(["hybridlm MLA + MoE"], HF_DEEPSEEK, "less", 1.15, 0.9)],
    ),
}


if __name__ == "__main__":
    run("training", __doc__, {name: partial(measure, measurement) for name, measurement in MEASUREMENTS.items()})
