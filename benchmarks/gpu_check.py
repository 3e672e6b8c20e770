"""What hybridlm does on an NVIDIA GPU: kernels, memory against its plan, training and decode speed, peers, and the
targets of all of them.

    python benchmarks/gpu_check.py                       all parts, about 25 minutes on an H100
    python benchmarks/gpu_check.py --only decode,peers   some of them; earlier results of the others stay in the files
    python benchmarks/gpu_check.py --dry-run             each part's code on the CPU with tiny shapes; its numbers mean
                                                         nothing

It writes benchmarks/results/gpu-CARD.md and .json. Results are written after each part. Without a GPU it
prints what it would do. Each part runs in its own process with a time limit; what fails becomes a row with its error,
the rest continues, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from gpu import activations, decode, memory, peers, suite, throughput
from gpu.part import Part, Row
from gpu.report import Results, rows_table
from gpu.setting import Setting
from harness.report import RESULTS, machine
from harness.turns import LeftOut

from hybridlm.machine.device import device_facts

ALL = (suite.PART, memory.MEMORY, memory.SLM_PART, activations.PART, throughput.PART, decode.PART, peers.PART)
PARTS: dict[str, Part] = {part.name: part for part in ALL}
SCRIPT = Path(__file__)


def plan_text(setting: Setting) -> str:
    """What a run would do."""
    lines = [
        (
            "No NVIDIA GPU here. On one, this script would make these measurements (--dry-run runs their code on this"
            " CPU):"
        ),
        "",
    ]
    for part in PARTS.values():
        cases = part.cases(setting)
        lines += [f"{part.name} (at most {part.seconds} s): {part.what}", *(f"    {case}" for case in cases), ""]
    bars = [bar for part in PARTS.values() for bar in part.bars]
    return "\n".join(
        [*lines, "and compare them with these targets:", "", *(f"    {bar.what}: {bar.bound}" for bar in bars)]
    )


def work(setting: Setting, part: Part, cases: Sequence[str], target: Path) -> None:
    """In a process of its own: measures the cases and appends their rows, line by line."""
    torch.manual_seed(0)
    with open(target, "a", encoding="utf-8") as file:
        for case in cases:
            try:
                for row in part.measure(setting, case):
                    print(json.dumps(row), file=file, flush=True)
            except LeftOut as reason:
                print(json.dumps({"case": case, "left_out": str(reason)}), file=file, flush=True)
            except Exception as error:  # whatever it is, the other cases go on
                first = next((line for line in str(error).splitlines() if line.strip()), "")
                print(
                    json.dumps({"case": case, "error": f"{type(error).__name__}: {first[:300]}"}), file=file, flush=True
                )
            setting.release()


def _kill(worker: subprocess.Popen[str]) -> None:
    """Ends a worker with what it has started: pytest, say, would hold the card on."""
    if hasattr(os, "killpg"):
        os.killpg(worker.pid, signal.SIGKILL)
    else:  # Windows
        worker.kill()
    worker.wait()


def _process(part: Part, cases: Sequence[str], flags: Sequence[str], seconds: float) -> list[Row]:
    """The rows of these cases, measured in a fresh process; one without a row gets the reason."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "rows.jsonl"
        target.touch()
        line = [
            sys.executable,
            str(SCRIPT),
            "--worker",
            part.name,
            "--rows",
            str(target),
            "--cases",
            json.dumps(list(cases)),
            *flags,
        ]
        worker = subprocess.Popen(
            line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            said = worker.communicate(timeout=seconds)[1]
            why = f"the process ended with {worker.returncode}: {(said.strip().splitlines() or [''])[-1][:300]}"
        except subprocess.TimeoutExpired:
            why = f"stopped after {seconds:.0f} s"
            _kill(worker)
        rows: list[Row] = [json.loads(text) for text in target.read_text(encoding="utf-8").splitlines()]
    seen = {row["case"] for row in rows}
    return rows + [{"case": case, "error": why} for case in cases if case not in seen]


def measured(part: Part, setting: Setting, flags: Sequence[str]) -> list[Row]:
    """All rows of a part, within its time; of a dry run within ten times that, as a CPU may be busy with other
    things."""
    cases, end = list(part.cases(setting)), time.perf_counter() + part.seconds * (10 if setting.dry else 1)
    rows: list[Row] = []
    for some in [[case] for case in cases] if part.fresh else [cases]:
        left = end - time.perf_counter()
        if left < 1:
            rows += [{"case": case, "error": f"not begun: the part's {part.seconds} s were spent"} for case in some]
        else:
            rows += _process(part, some, flags, left)
    return rows


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PART[,PART]", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="a third of the rounds")
    parser.add_argument("--dry-run", action="store_true", help="every part's code on the CPU with tiny shapes")
    parser.add_argument(
        "--out", type=Path, help="folder of the result files (default benchmarks/results; of a dry run none)"
    )
    for name in ("--worker", "--rows", "--cases"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = [name for name in (arguments.only or "").split(",") if name and name not in PARTS]
    if unknown:
        parser.error(f"--only {arguments.only}: no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return arguments


def main() -> int:
    arguments = _arguments()
    setting = Setting(dry=arguments.dry_run, quick=arguments.quick)
    if arguments.worker:
        work(setting, PARTS[arguments.worker], json.loads(arguments.cases), Path(arguments.rows))
        return 0
    if not setting.dry and not setting.on_gpu:
        print(plan_text(setting))
        return 0
    names = [name for name in PARTS if arguments.only is None or name in arguments.only.split(",")]
    flags = [flag for flag, on in (("--dry-run", setting.dry), ("--quick", setting.quick)) if on]
    card = "A dry run, whose numbers mean nothing" if setting.dry else device_facts().name
    with tempfile.TemporaryDirectory() as scratch:
        results = Results(arguments.out or (Path(scratch) if setting.dry else RESULTS), card, PARTS, dry=setting.dry)
        for name in names:
            print(f"{name}: {PARTS[name].what}", flush=True)
            began = time.perf_counter()
            rows = measured(PARTS[name], setting, flags)
            command = " ".join(["python benchmarks/gpu_check.py --only", name, *flags])
            results.add(name, command, f"{card}; {machine()}", time.perf_counter() - began, rows)
            print("\n".join(rows_table(rows)) + "\n", flush=True)
        print("\n".join(results.bars()))
        errors = results.errors(names)
        print("\n".join([f"\n{len(errors)} failed:", *errors]) if errors else "\nnothing failed", flush=True)
        if not setting.dry or arguments.out:
            print(f"written: {results.page} and {results.json.name}")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
