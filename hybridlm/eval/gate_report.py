"""What `hybridlm check` prints: aligned lines for people, a line of JSON for each row for programs."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict

from hybridlm.config.run import RunConfig
from hybridlm.eval.gate import Gate, Row

_COLUMNS = ("check", "compared", "worst error", "limit", "", "seconds")
_ALIGNED = (str.ljust, str.ljust, str.rjust, str.rjust, str.ljust, str.rjust)


def run_check(config: RunConfig, *, as_json: bool) -> bool:
    """Runs the gate and prints its rows as they come. False where a row fails."""
    began = time.perf_counter()
    gate = Gate(config)
    title = f"{config.model.name}: {gate.head_line}"
    rows = _print_json(gate, title) if as_json else _print_lines(gate, title)
    failed = [row for row in rows if row.status == "fail"]
    if not as_json:
        for row in failed:
            print(f"{row.name}: {row.note}")
        ran = sum(row.status != "n/a" for row in rows)
        verdict = f"{len(failed)} of {ran} checks failed" if failed else f"{ran} checks passed"
        print(f"{verdict} in {time.perf_counter() - began:.1f} s")
    return not failed


def _cells(row: Row) -> tuple[str, ...]:
    if row.status == "n/a":
        return row.name, row.note, "", "", "n/a", ""
    return row.name, row.compared, f"{row.error:.1e}", f"{row.limit:.0e}", row.status.upper(), f"{row.seconds:.1f}"


def _print_lines(gate: Gate, title: str) -> list[Row]:
    rows: list[Row] = []
    print(title, flush=True)
    widths = (max(map(len, gate.names)), 70, 11, 7, 6, 7)

    def line(cells: tuple[str, ...]) -> str:
        return "  ".join(
            align(cell, width) for align, cell, width in zip(_ALIGNED, cells, widths, strict=True)
        ).rstrip()

    print(line(_COLUMNS), flush=True)
    for row in gate.rows():
        rows.append(row)
        print(line(_cells(row)), flush=True)
    return rows


def _print_json(gate: Gate, title: str) -> list[Row]:
    """First what was run, then one object a row. JSON knows no infinity: ``error`` is null where it is not finite."""
    rows: list[Row] = []
    print(json.dumps({"checked": title}), flush=True)
    for row in gate.rows():
        rows.append(row)
        print(json.dumps(asdict(row) | {"error": row.error if math.isfinite(row.error) else None}), flush=True)
    return rows
