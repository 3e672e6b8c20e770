"""Results of an evaluation as tables, and the loss by position as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from hybridlm.eval.results import Record
from hybridlm.files.durable import replaced
from hybridlm.report.plots.colours import COLOURS, MARKERS

_SHOWN = {"loss": "loss", "ppl": "ppl", "bpb": "bits/byte", "tokens": "tokens", "documents": "docs"}
_BAR = 40  # characters of the longest bar


def print_records(records: Sequence[Record], console: Console) -> None:
    """The losses in one table, each loss by position below it, then tasks and probes."""
    losses = [record for record in records if record.what == "loss"]
    if losses:
        console.print(_losses(losses))
        for record in losses:
            if len(record.curve) > 1:
                console.print(_curve(record))
    others = [record for record in records if record.what != "loss"]
    if others:
        table = Table("what", "metric", "value", box=SIMPLE)
        table.columns[2].justify = "right"
        for record in others:
            at = f", {record.settings['context']} tokens" if record.what.startswith("answers/") else ""
            for place, (name, value) in enumerate(record.metrics.items()):
                table.add_row(record.what + at if not place else "", name, number(value))
        console.print(table)


def number(value: float) -> str:
    """Counts in full, everything else with four decimals."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _losses(records: Sequence[Record]) -> Table:
    table = Table("text", "context", "stride", *_SHOWN.values(), box=SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
    for record in records:
        settings, metrics = record.settings, record.metrics
        cells = [number(metrics[name]) if name in metrics else "" for name in _SHOWN]
        text = f"{settings['split']}, {settings['part']}" if "part" in settings else settings["split"]
        table.add_row(text, str(settings["context"]), str(settings["stride"]), *cells)
    return table


def _curve(record: Record) -> Table:
    table = Table(
        "tokens before",
        "targets",
        "loss",
        "",
        title=f"does it use its context? ({record.settings['context']} tokens)",
        box=SIMPLE,
    )
    table.columns[1].justify = table.columns[2].justify = "right"
    most = max(row["loss"] for row in record.curve)
    for row in record.curve:
        span = f"{row['first']}" if row["first"] == row["last"] else f"{row['first']}-{row['last']}"
        table.add_row(span, f"{row['tokens']:,}", f"{row['loss']:.4f}", "#" * max(1, round(_BAR * row["loss"] / most)))
    return table


def plot_curves(records: Sequence[Record], path: Path) -> None:
    """Loss by the tokens before the target, a line for each context. OSError: it cannot be written."""
    from matplotlib.figure import Figure  # not pyplot, which would open a window

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for place, record in enumerate(records):
        behind = [(row["first"] * row["last"]) ** 0.5 for row in record.curve]
        axes.plot(
            behind,
            [row["loss"] for row in record.curve],
            color=COLOURS[place % len(COLOURS)],
            marker=MARKERS[place % len(MARKERS)],
            label=f"window of {record.settings['context']} tokens",
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("tokens of the document before the target, in its window")
    axes.set_ylabel("loss, nats per token")
    axes.set_title(f"Loss by position, {records[0].settings['split']} text, step {records[0].step}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with replaced(path) as new:
        figure.savefig(new, dpi=150, format="png")
