"""Puts the table of the profiles of conf/hardware into docs/hardware.md between its two marks.

python docs/hardware.py          # rewrite the table
"""

from __future__ import annotations

import re
from pathlib import Path

from hybridlm.config.hardware import HardwareConfig
from hybridlm.machine.profiles import known_profiles

PAGE = Path(__file__).resolve().parent / "hardware.md"
MARKS = re.compile(r"(<!-- table: python docs/hardware.py -->\n).*?(<!-- end of table -->)", re.DOTALL)
HEADER = """| option | GiB | capability | bfloat16 | shared memory, KiB | fp32, tf32, fp16, bf16, TFLOP/s | GB/s |
|---|---|---|---|---|---|---|
"""


def row(profile: HardwareConfig) -> str:
    peaks = profile.peak_tflops
    rates = ", ".join("-" if peak is None else f"{peak:g}" for peak in (peaks.fp32, peaks.tf32, peaks.fp16, peaks.bf16))
    return (
        f"| `{profile.name}` | {profile.memory_gb:g} | {profile.compute_capability} | {'yes' if profile.bf16 else 'no'}"
        f" | {profile.shared_memory_kb} | {rates} | {profile.bandwidth_gb_s:,.0f} |\n"
    )


def table() -> str:
    """Every profile that names a card, as Markdown."""
    return HEADER + "".join(map(row, known_profiles()))


def page(text: str) -> str:
    """The page with the table of today."""
    return MARKS.sub(lambda marks: marks[1] + table() + marks[2], text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
