"""The result files of gpu_check.py: every row as JSON, and a page with the bars and a table for each part."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpu.part import Part, Row
from gpu.throughput import crossover
from harness.report import table


class Results:
    """gpu-CARD.json and gpu-CARD.md in a folder, written anew after each part. Parts measured earlier on this card
    stay."""

    def __init__(self, folder: Path, card: str, parts: Mapping[str, Part], *, dry: bool) -> None:
        name = "dry run" if dry else card.lower().replace("nvidia ", "")
        slug = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
        self.json, self.page = folder / f"gpu-{slug}.json", folder / f"gpu-{slug}.md"
        self._card, self._parts, self._dry = card, parts, dry
        self._found: dict[str, dict[str, object]] = (
            json.loads(self.json.read_text(encoding="utf-8")) if self.json.exists() else {}
        )

    def add(self, part: str, command: str, where: str, seconds: float, rows: Sequence[Row]) -> None:
        self._found[part] = {"command": command, "where": where, "seconds": round(seconds, 1), "rows": list(rows)}
        self.json.parent.mkdir(parents=True, exist_ok=True)
        self.json.write_text(json.dumps(self._found, indent=1) + "\n", encoding="utf-8")
        self.page.write_text("\n".join(self._lines()) + "\n", encoding="utf-8")

    def rows(self, part: str) -> list[Row]:
        return list(self._found[part]["rows"]) if part in self._found else []  # type: ignore[call-overload]

    def bars(self) -> list[str]:
        """The table of bars."""
        rows = [bar.row(self.rows(part.name)) for part in self._parts.values() for bar in part.bars]
        return table(
            ("target", "at least", "measured", "verdict"),
            [[*row[:3], "dry run"] for row in rows] if self._dry else rows,
        )

    def errors(self, names: Sequence[str]) -> list[str]:
        return [f"{name}, {row['case']}: {row['error']}" for name in names for row in self.rows(name) if "error" in row]

    def _lines(self) -> list[str]:
        lines = [f"# {self._card}", "", *self.bars()]
        for name, part in self._parts.items():
            if name not in self._found:
                lines += ["", f"## {name}", "", f"Not run: {part.what}."]
                continue
            found, rows = self._found[name], self.rows(name)
            lines += [
                "",
                f"## {name}",
                "",
                f"`{found['command']}`",
                "",
                f"{found['where']}; {found['seconds']} s",
                "",
                f"{part.what}.",
                "",
            ]
            if name == "throughput":
                lines += [crossover(rows), ""]
            lines += rows_table(rows)
        return lines


def rows_table(rows: Sequence[Row]) -> list[str]:
    """The columns of all rows; those without numbers say why."""
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in ("error", "left_out")))
    why = any("error" in row or "left_out" in row for row in rows)
    header = [*columns, *(["why not"] if why else [])]
    return table(header, [[*(_cell(row.get(name)) for name in columns), *([_why(row)] if why else [])] for row in rows])


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)


def _why(row: Row) -> str:
    return f"error: {row['error']}" if "error" in row else f"left out: {row['left_out']}" if "left_out" in row else ""
