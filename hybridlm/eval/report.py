"""Results of an evaluation as tables, and the loss by position as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table

from hybridlm.eval.results import Record
from hybridlm.files.durable import replaced
from hybridlm.report.plots.colours import COLOURS, MARKERS

_SHOWN = {"loss": "loss", "ppl": "ppl", "bpb": "bits/byte", "tokens": "tokens", "documents": "docs"}
_BAR = 40  # characters of the longest bar


def print_records(records: Sequence[Record], console: Console) -> None:
    """The losses in one table, each loss by position below it, then tasks and probes."""
    losses = [record for record in records if record.what == "loss"]
    table = _table("text", "context", "stride", *_SHOWN.values())
    for record in losses:
        settings, metrics = record.settings, record.metrics
        cells = [number(metrics[name]) if name in metrics else "" for name in _SHOWN]
        text = ", ".join(settings[name] for name in ("split", "part") if name in settings)
        table.add_row(text, str(settings["context"]), str(settings["stride"]), *cells)
    others = _table("what", "metric", "value")
    others.columns[1].justify = "left"
    for record in records:
        at = f", {record.settings['context']} tokens" if record.what.startswith("answers/") else ""
        for place, (name, value) in enumerate(record.metrics.items() if record.what != "loss" else ()):
            others.add_row(record.what + at if not place else "", name, number(value))
    curves = [_curve(record) for record in losses if len(record.curve) > 1]
    for one in (table, *curves, others):
        if one.rows:
            console.print(one)


def number(value: float) -> str:
    """Counts in full, everything else with four decimals."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _table(first: str, *numbers: str, title: str | None = None) -> Table:
    return Table(first, *(Column(name, justify="right") for name in numbers), title=title, box=SIMPLE)


def _curve(record: Record) -> Table:
    title = f"does it use its context? ({record.settings['context']} tokens)"
    table = _table("tokens before", "targets", "loss", title=title)
    table.add_column()
    most = max(row["loss"] for row in record.curve)
    for row in record.curve:
        span = f"{row['first']}" if row["first"] == row["last"] else f"{row['first']}-{row['last']}"
        table.add_row(span, f"{row['tokens']:,}", f"{row['loss']:.4f}", "#" * max(1, round(_BAR * row["loss"] / most)))
    return table


def plot_curves(records: Sequence[Record], path: Path) -> bool:
    """Loss by the tokens before the target, a line for each context; False if no record has a curve. OSError: it cannot
    be written."""
    from matplotlib.figure import Figure  # not pyplot, which would open a window

    plotted = [record for record in records if record.what == "loss" and len(record.curve) > 1]
    if not plotted:
        return False
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for colour, marker, record in zip(cycle(COLOURS), cycle(MARKERS), plotted, strict=False):
        behind = [(row["first"] * row["last"]) ** 0.5 for row in record.curve]
        label = f"window of {record.settings['context']} tokens"
        axes.plot(behind, [row["loss"] for row in record.curve], color=colour, marker=marker, label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set(
        xlabel="tokens of the document before the target, in its window",
        ylabel="loss, nats per token",
        title=f"Loss by position, {plotted[0].settings['split']} text, step {plotted[0].step}",
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with replaced(path) as new:
        figure.savefig(new, dpi=150, format="png")
    return True
