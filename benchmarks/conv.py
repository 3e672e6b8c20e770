"""The causal depthwise convolution of hybridlm.ops against torch's conv1d and conv2d (channels last), forward and
backward.

python benchmarks/conv.py            prints a table and writes benchmarks/results/conv.md
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from hybridlm.ops.conv import causal_conv

BATCH, LENGTH, CHANNELS, WIDTH, ROUNDS = 8, 256, 512, 4, 25


def conv1d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """torch's Conv1d as mamba_ssm's reference path uses it."""
    return F.silu(
        F.conv1d(x.transpose(1, 2), weight, bias, padding=WIDTH - 1, groups=CHANNELS)[..., :LENGTH].transpose(1, 2)
    )


def conv2d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The same as an image of width 1: (B, T, C) is channels-last already, so nothing is copied."""
    image = F.pad(x, (0, 0, WIDTH - 1, 0)).transpose(1, 2).unsqueeze(-1)
    return F.silu(F.conv2d(image, weight.unsqueeze(-1), bias, groups=CHANNELS).squeeze(-1).transpose(1, 2))


def ours(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return causal_conv(x, weight, bias)[0]


def main() -> None:
    """Times the three in turn and writes the table."""
    torch.manual_seed(0)
    leaves = [torch.randn(BATCH, LENGTH, CHANNELS), torch.randn(CHANNELS, 1, WIDTH), torch.randn(CHANNELS)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    grad = torch.randn(BATCH, LENGTH, CHANNELS)
    contenders: dict[str, Callable[..., torch.Tensor]] = {
        "hybridlm": ours,
        "torch conv1d": conv1d,
        "torch conv2d, channels last": conv2d,
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_index in range(ROUNDS + 3):
        for name, function in contenders.items():
            start = time.perf_counter()
            torch.autograd.grad(function(*leaves), leaves, grad)
            if round_index >= 3:
                times[name].append(time.perf_counter() - start)
    base = times["hybridlm"]
    lines = [
        (
            f"Forward and backward of ({BATCH}, {LENGTH}, {CHANNELS}), width {WIDTH}, fp32; {ROUNDS} rounds; torch"
            f" {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}. `python"
            " benchmarks/conv.py`"
        ),
        "",
        "| | median ms | time over hybridlm's: median [min, max] of the rounds |",
        "|---|---|---|",
    ]
    for name, measured in times.items():
        ratios = [a / b for a, b in zip(measured, base, strict=True)]
        lines.append(
            f"| {name} | {1e3 * statistics.median(measured):.1f} | {statistics.median(ratios):.2f} [{min(ratios):.2f},"
            f" {max(ratios):.2f}] |"
        )
    text = "\n".join(lines)
    print(text)
    target = Path(__file__).parent / "results" / "conv.md"
    target.parent.mkdir(exist_ok=True)
    target.write_text("# Causal depthwise convolution\n\n" + text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
