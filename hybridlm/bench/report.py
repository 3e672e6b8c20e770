"""The results of a benchmark as rows and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table

from hybridlm.bench.measurement import Measurement

_TIMES = {"first ms": "first_token_s", "p50 ms": "token_s_p50", "p90 ms": "token_s_p90", "p99 ms": "token_s_p99"}
_RATES = {"prefill/s": "prefill_tokens_per_s", "decode/s": "decode_tokens_per_s"}
_BYTES = {"cache": "cache_bytes", "memory": "peak_bytes"}
_COLUMNS = ("batch", "context", "prefill/s", "first ms", "decode/s", "p50 ms", "p90 ms", "p99 ms", "cache", "memory")


def rows(points: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Flat, for JSON: one object per measurement; ``decode_ratio`` is relative to the first model at the same batch and
    context, round by round."""
    found = []
    for point in points:
        row: dict[str, Any] = asdict(point) | {"rounds": len(point.rounds)} | point.figures()
        base = next(other for other in points if (other.batch, other.context) == (point.batch, point.context))
        if base is not point and (compared := point.decode_ratio(base)):
            row |= dict(zip(("decode_ratio", "decode_ratio_low", "decode_ratio_high"), compared, strict=True))
        found.append(row)
    return found


def print_rows(found: Sequence[dict[str, Any]], console: Console) -> None:
    """A row for each measurement, and below the table why some were left out."""
    headings = [Column(name, justify="right") for name in (*_COLUMNS, "decode ratio")]
    table = Table("model", *headings, box=SIMPLE)
    for row in found:
        cells = {"batch": str(row["batch"]), "context": f"{row['context']:,}"}
        cells |= {name: f"{1e3 * row[key]:,.2f}" for name, key in _TIMES.items() if key in row}
        cells |= {name: f"{row[key]:,.0f}" for name, key in _RATES.items() if key in row}
        cells |= {name: _mib(row[key]) for name, key in _BYTES.items() if key in row}
        if row["left_out"]:
            cells["prefill/s"] = "left out"
        if "decode_ratio" in row:
            low, high = row["decode_ratio_low"], row["decode_ratio_high"]
            cells["decode ratio"] = f"{row['decode_ratio']:.2f} [{low:.2f}, {high:.2f}]"
        table.add_row(row["model"], *(cells.get(str(column.header), "") for column in headings))
    console.print(table)
    for row in [row for row in found if row["left_out"]]:
        place = f"{row['model']}, batch {row['batch']}, context {row['context']:,}"
        console.print(f"left out  {place}: {row['left_out']}", soft_wrap=True)


def _mib(number: float) -> str:
    return f"{number / 2**20:,.{2 if number < 100 * 2**20 else 0}f} MiB"
