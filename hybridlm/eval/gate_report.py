"""What `hybridlm check` prints: a table for people, a line of JSON for each row for programs."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hybridlm.config.run import RunConfig
from hybridlm.eval.gate import Gate, Row

_COLUMNS = ("check", "compared", "worst error", "limit", "", "seconds")
_STYLES = {"pass": "green", "fail": "bold red", "n/a": "dim"}


def run_check(config: RunConfig, *, as_json: bool) -> bool:
    """Runs the gate and prints its rows as they come (in a terminal as one table). False where a row fails."""
    began = time.perf_counter()
    gate = Gate(config)
    title = f"{config.model.name}: {gate.head_line}"
    if as_json:
        return _print_json(gate, title)
    console = Console(highlight=False, soft_wrap=True)
    rows = _print_table(gate, title, console) if console.is_terminal else _print_lines(gate, title)
    failed = [row for row in rows if row.status == "fail"]
    for row in failed:
        console.print(Text(f"{row.name}: {row.note}"))
    ran = sum(row.status != "n/a" for row in rows)
    verdict = f"{len(failed)} of {ran} checks failed" if failed else f"{ran} checks passed"
    console.print(Text(f"{verdict} in {time.perf_counter() - began:.1f} s"))
    return not failed


def _cells(row: Row) -> tuple[str, ...]:
    if row.status == "n/a":
        return row.name, row.note, "", "", "n/a", ""
    return row.name, row.compared, f"{row.error:.1e}", f"{row.limit:.0e}", row.status.upper(), f"{row.seconds:.1f}"


def _print_table(gate: Gate, title: str, console: Console) -> list[Row]:
    table = Table(title=title, title_justify="left", title_style="")
    for i, column in enumerate(_COLUMNS):
        table.add_column(column, justify="right" if i in (2, 3, 5) else "left", no_wrap=i != 1)
    rows = []
    with console.status(gate.names[0]) as status:
        for place, row in enumerate(gate.rows(), 1):
            rows.append(row)
            name, compared, *others = _cells(row)
            table.add_row(name, compared, *others[:2], Text(others[2], _STYLES[row.status]), others[3])
            status.update(gate.names[min(place, len(gate.names) - 1)])
    console.print(table)
    return rows


def _print_lines(gate: Gate, title: str) -> list[Row]:
    rows: list[Row] = []
    print(title, flush=True)
    widths = (max(map(len, gate.names)), 70, 11, 7, 6, 7)
    aligned = (str.ljust, str.ljust, str.rjust, str.rjust, str.ljust, str.rjust)

    def line(cells: tuple[str, ...]) -> str:
        return "  ".join(align(cell, width) for align, cell, width in zip(aligned, cells, widths, strict=True)).rstrip()

    print(line(_COLUMNS), flush=True)
    for row in gate.rows():
        rows.append(row)
        print(line(_cells(row)), flush=True)
    return rows


def _print_json(gate: Gate, title: str) -> bool:
    """First what was run, then one object a row. JSON knows no infinity: ``error`` is null where it is not finite."""
    print(json.dumps({"checked": title}), flush=True)
    passed = True
    for row in gate.rows():
        passed = passed and row.status != "fail"
        print(json.dumps(asdict(row) | {"error": row.error if math.isfinite(row.error) else None}), flush=True)
    return passed
