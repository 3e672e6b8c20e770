"""The results of a benchmark as rows, as a table, and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from hybridlm.bench.measurement import Measurement
from hybridlm.report.plots.colours import COLOURS, MARKERS

_COLUMNS = (
    "model",
    "batch",
    "context",
    "prefill/s",
    "first ms",
    "decode/s",
    "p50 ms",
    "p90 ms",
    "p99 ms",
    "cache",
    "memory",
    "decode ratio",
)
_LINES = ("-", "--", ":", "-.")
_PANELS = (
    ("decode_tokens_per_s", "decode, tokens/s"),
    ("cache_bytes", "cache, MiB"),
    ("prefill_tokens_per_s", "prefill, tokens/s"),
)


def rows(points: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Flat, for JSON: one object per measurement; ``decode_ratio`` is relative to the first model at the same batch and
    context, round by round."""
    found = []
    for point in points:
        row: dict[str, Any] = {
            "model": point.name,
            "batch": point.batch,
            "context": point.context,
            "parameters": point.parameters,
            "weight_bytes": point.weight_bytes,
            "cache_bytes": point.cache_bytes,
            "cache_bytes_measured": point.cache_bytes_measured,
            "left_out": point.left_out,
            "rounds": len(point.rounds),
            **point.figures(),
        }
        base = next(other for other in points if (other.batch, other.context) == (point.batch, point.context))
        if base is not point and (compared := point.decode_ratio(base)):
            row |= dict(zip(("decode_ratio", "decode_ratio_low", "decode_ratio_high"), compared, strict=True))
        found.append(row)
    return found


def print_rows(found: Sequence[dict[str, Any]], console: Console) -> None:
    """A row for each measurement, and below the table why some were left out."""
    table = Table(*_COLUMNS, box=SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in found:
        start = (row["model"], str(row["batch"]), f"{row['context']:,}")
        if row["left_out"]:
            table.add_row(*start, "left out", *[""] * 5, _mib(row["cache_bytes"]))
            continue
        ms = [f"{1e3 * row[name]:,.2f}" for name in ("first_token_s", "token_s_p50", "token_s_p90", "token_s_p99")]
        memory = _mib(row["peak_bytes"]) if "peak_bytes" in row else ""
        compared = (
            f"{row['decode_ratio']:.2f} [{row['decode_ratio_low']:.2f}, {row['decode_ratio_high']:.2f}]"
            if "decode_ratio" in row
            else ""
        )
        rates = [f"{row[name]:,.0f}" for name in ("prefill_tokens_per_s", "decode_tokens_per_s")]
        table.add_row(*start, rates[0], ms[0], rates[1], *ms[1:], _mib(row["cache_bytes"]), memory, compared)
    console.print(table)
    for row in found:
        if row["left_out"]:
            console.print(
                f"left out  {row['model']}, batch {row['batch']}, context {row['context']:,}: {row['left_out']}",
                soft_wrap=True,
            )


def _mib(number: float) -> str:
    return f"{number / 2**20:,.2f} MiB" if number < 100 * 2**20 else f"{number / 2**20:,.0f} MiB"


def plot(found: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Three panels over the context: a colour and marker per model, a line style per batch. OSError: it cannot be
    written."""
    from matplotlib.figure import Figure  # not pyplot, which would open a window
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(12.0, 4.2), layout="constrained")
    models, batches = (list(dict.fromkeys(row[name] for row in found)) for name in ("model", "batch"))
    for axes, (name, label) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        for place, model in enumerate(models):
            for style, batch in enumerate(batches):
                mine = [row for row in found if (row["model"], row["batch"]) == (model, batch) and name in row]
                scale = 2**20 if name == "cache_bytes" else 1
                axes.plot(
                    [row["context"] for row in mine],
                    [row[name] / scale for row in mine],
                    color=COLOURS[place % len(COLOURS)],
                    marker=MARKERS[place % len(MARKERS)],
                    linestyle=_LINES[style % len(_LINES)],
                    label=model if len(batches) == 1 else f"{model}, batch {batch}",
                )
        axes.set_xscale("log", base=2)
        if any(name in row for row in found):  # a log scale needs a value
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.set_xticks(sorted({row["context"] for row in found}))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlabel("context, tokens")
        axes.set_title(label)
        axes.grid(alpha=0.3, which="both")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
