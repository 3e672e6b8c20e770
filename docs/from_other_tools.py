"""Writes the names of other programs' settings into docs/from_other_tools.md, between its two marks.

python docs/from_other_tools.py
"""

from __future__ import annotations

import re
from pathlib import Path

from hybridlm.config.foreign_names import NAMES

PAGE = Path(__file__).resolve().parent / "from_other_tools.md"
MARKS = re.compile(r"(<!-- table: python docs/from_other_tools.py -->\n).*?(<!-- end of table -->)", re.DOTALL)


def tables() -> str:
    """A table for each program, as Markdown."""
    parts = []
    for tool, names in NAMES.items():
        rows = [
            f"| `{name}` | {f'`{found.ours}`' if found.ours else 'none'} | {found.remark} |\n"
            for name, found in names.items()
        ]
        parts.append(f"| {tool} | here | |\n|---|---|---|\n{''.join(rows)}")
    return "\n".join(parts)


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(MARKS.sub(lambda match: match[1] + tables() + match[2], text), encoding="utf-8")


if __name__ == "__main__":
    main()
