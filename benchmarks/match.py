"""How near patterns come to the cost of all attention, what is changed for it, and how long the search takes.

python benchmarks/match.py      prints the tables and writes benchmarks/results/match.md
"""

from __future__ import annotations

import re
import time

from harness.report import RESULTS, machine, table

from hybridlm.cli.compose import compose_config
from hybridlm.sweep.matching import TOLERANCE, matched

BASE = ("model=hybrid_alternating", "size=d12", "data.seq_len=1024")
WITH_FFN = ("M", "TM", "MMMT", "M3*2 T", "M1:mlp T", "L", "T:moe", "L:moe M", "(M M M L:moe)*2", "M1 M2:none M3 T")
WITHOUT_FFN = ("M:none", "M1:none", "M3:none", "T:none", "L:none", "M:none T:none")

_NOTE = re.compile(r"(.+): ([\d,]+) .+, pattern T [\d,]+, (.+)")  # what was changed, the cost, the difference


def _rows(patterns: tuple[str, ...], by: str) -> list[list[str]]:
    rows = []
    for pattern in patterns:
        config = compose_config([*BASE, f"model.pattern={pattern}"])
        asked = config.model_copy(update={"sweep": config.sweep.model_copy(update={"match": by})})
        began = time.perf_counter()
        note = matched(asked).config.sweep.matched or ""
        seconds = time.perf_counter() - began
        if (parts := _NOTE.fullmatch(note)) is None:
            raise ValueError(note)
        rows.append([f"`{pattern}`", *parts.groups(), f"{seconds:.2f}"])
    return rows


def main() -> None:
    """Both matches, patterns with and without FFNs."""
    command = "python benchmarks/match.py"
    lines = [f"`{command}`", "", machine(), "", f"`{' '.join(BASE)}`, brought to pattern T."]
    for by, unit in (("params", "parameters"), ("flops", "training FLOPs per token")):
        lines += ["", f"sweep.match={by}, tolerance {TOLERANCE[by]:.0%}:", ""]
        lines += table(("pattern", "changed", unit, "difference", "seconds"), _rows(WITH_FFN + WITHOUT_FFN, by))
    text = "# match\n\n" + "\n".join(lines) + "\n"
    print(text)
    (RESULTS / "match.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
