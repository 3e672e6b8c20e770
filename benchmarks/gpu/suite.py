"""The tests marked gpu, kernel parity among them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from gpu.part import Part, Row
from gpu.setting import Setting

ROOT = Path(__file__).parents[2]
COUNTS = re.compile(r"(\d+) (passed|failed|skipped)|(\d+)/\d+ tests (collected)")
OUTCOMES = ("passed", "failed", "skipped")
NOTHING_COLLECTED = 5  # pytest's exit code


def _measure(setting: Setting, case: str) -> Iterator[Row]:
    line = [
        sys.executable,
        "-m",
        "pytest",
        "-n0",
        "-m",
        "gpu",
        "tests",
        "--no-header",
    ]  # one more -q beside the project's own would hide the counts
    done = subprocess.run([*line, "--collect-only"] if setting.dry else line, cwd=ROOT, capture_output=True, text=True)
    counts = {name or collected: int(number or some) for number, name, some, collected in COUNTS.findall(done.stdout)}
    row: Row = {
        "case": case,
        **({"collected": counts.get("collected", 0)} if setting.dry else {n: counts.get(n, 0) for n in OUTCOMES}),
    }
    failed = [text for text in done.stdout.splitlines() if text.startswith(("FAILED", "ERROR"))]
    if done.returncode == NOTHING_COLLECTED:
        row["left_out"] = "no test is marked gpu"
    elif done.returncode:
        row["error"] = "; ".join(failed)[:600] or done.stderr.strip()[-300:]
    yield row


PART = Part(
    "tests",
    "the tests that need a GPU (pytest -m gpu): each compiled kernel's outputs and gradients against the torch path",
    240,
    lambda setting: ["pytest -m gpu"],
    _measure,
)
