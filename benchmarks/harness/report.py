"""What stands around every measurement: arguments, the machine's description, tables, and the result file."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch
from harness.turns import MIN_ROUNDS, LeftOut, Ratio

RESULTS = Path(__file__).parent.parent / "results"
THREADS = 2
PEERS = ("torch", "transformers", "mambapy")


def _processor() -> str:
    try:
        names = [
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> str:
    """One line: processor, cores, threads, versions, and the machine's load just now."""
    versions = []
    for package in PEERS:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"no {package}")
    others = f"; load {os.getloadavg()[0]:.1f} when it began" if hasattr(os, "getloadavg") else ""
    return f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; {', '.join(versions)}{others}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def verdict(value: float, floor: float, goal: float, better: Literal["more", "less"]) -> str:
    """Which of the two bounds ``value`` keeps."""
    sign = 1 if better == "more" else -1
    if sign * value >= sign * goal:
        return "goal"
    return "floor" if sign * value >= sign * floor else "**neither**"


def bound_row(question: str, value: Ratio, floor: float, goal: float, better: Literal["more", "less"]) -> list[str]:
    """One row of a table with the columns of ``BOUNDS``."""
    sign = ">=" if better == "more" else "<="
    return [question, str(value), f"{sign} {floor:g}", f"{sign} {goal:g}", verdict(value.median, floor, goal, better)]


BOUNDS = ("ratio", "median [min, max] of the rounds", "floor", "goal", "reached")


Measure = Callable[[int], list[str]]


def run(
    script: str,
    doc: str | None,
    measurements: Mapping[str, Measure],
    *,
    rounds: int = MIN_ROUNDS,
    least: int = MIN_ROUNDS,
) -> None:
    """Parses the arguments, makes the measurements asked for, prints each and writes it to ``results/SCRIPT_NAME.md``.

    measurements: by name, a function of the number of rounds that returns Markdown lines. One that cannot be made
    raises LeftOut with the reason, which is printed. rounds: the default; a measurement of fewer than ``least`` is
    printed and not written.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(measurements), help="one measurement (default: all)")
    parser.add_argument(
        "--rounds",
        type=int,
        default=rounds,
        help=f"rounds that count (default {rounds}); under {least} nothing is written",
    )
    parser.add_argument(
        "--threads", type=int, default=THREADS, help=f"threads (default {THREADS}); with others nothing is written"
    )
    arguments = parser.parse_args()
    if min(arguments.rounds, arguments.threads) < 1:
        parser.error("--rounds and --threads count from 1")
    kept = arguments.rounds >= least and arguments.threads == THREADS
    for name in [arguments.only] if arguments.only else measurements:
        target = RESULTS / (f"{script}.md" if len(measurements) == 1 else f"{script}_{name}.md")
        command = f"python benchmarks/{script}.py --only {name} --rounds {arguments.rounds}"
        torch.set_num_threads(arguments.threads)
        torch.manual_seed(0)
        where = machine()
        try:
            lines = measurements[name](arguments.rounds)
        except LeftOut as reason:
            print(f"{script} {name}: left out, {reason}\n", file=sys.stderr, flush=True)
            continue
        text = "\n".join([f"`{command}`", "", where, "", *lines])
        print(
            f"# {script}: {name}\n\n{text}\n" + ("" if kept else "\nA look only: not written to results/.\n"),
            flush=True,
        )
        if kept:
            target.parent.mkdir(exist_ok=True)
            target.write_text(f"# {script}: {name}\n\n{text}\n", encoding="utf-8")
