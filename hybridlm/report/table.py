"""Tables of a report: one of configurations, one of all runs; as Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hybridlm.errors import printable
from hybridlm.report.comparison import Comparison, Configuration
from hybridlm.report.metrics import COSTS, EXACT, QUALITIES, Difference, Metric, scale
from hybridlm.report.run_files import parsed_number
from hybridlm.report.runs import Run
from hybridlm.report.verdict import differences


@dataclass(frozen=True)
class Cell:
    """value: what the column is sorted by; None: the text."""

    text: str
    value: float | None = None


NOTHING = Cell("-", math.inf)


@dataclass(frozen=True)
class Column:
    heading: str
    unit: str = ""
    numeric: bool = False


@dataclass(frozen=True)
class Table:
    """If a row has fewer cells than there are columns, its last cell spans the rest."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]


def configurations_table(comparison: Comparison) -> Table:
    """A row per configuration, the best first, then one for each run that has not finished."""
    shown, quality = comparison.configurations, comparison.quality
    columns = [(Column("#", numeric=True), [Cell(str(i), i) for i in range(1, len(shown) + 1)])]
    for i, name in enumerate(comparison.columns or ("run",)):
        columns.append((Column(name), [_sortable((one.settings or (one.name,))[i]) for one in shown]))
    columns.append(_column(quality, shown))
    apart = [_difference(i, one, quality) for i, one in enumerate(differences(comparison))]
    columns.append((Column("vs best", numeric=True), apart + [NOTHING] * (len(shown) - len(apart))))
    columns.append((Column("runs", numeric=True), [Cell(str(len(one.runs)), len(one.runs)) for one in shown]))
    others = () if quality == QUALITIES[0] else (*QUALITIES, EXACT)
    for metric in [one for one in (*others, *COSTS) if one != quality]:
        if any(one.spread(metric) is not None for one in shown):
            columns.append(_column(metric, shown))
    unfinished = [
        (NOTHING, *map(_sortable, comparison.settings_of(run) or (run.name,)), Cell(_ending(run), math.inf))
        for run in comparison.unfinished
    ]
    rows = zip(*(cells for _, cells in columns), strict=True)
    return Table(tuple(heading for heading, _ in columns), (*rows, *unfinished))


def runs_table(comparisons: Sequence[Comparison]) -> Table:
    """A row per run, finished or not, with full precision: the content of report.csv."""
    settings = tuple(dict.fromkeys(column for one in comparisons for column in one.columns))
    everyone = [(comparison, run) for comparison in comparisons for run in comparison.runs]
    metrics = [one for one in (*QUALITIES, EXACT, *COSTS) if any(one.of(run) is not None for _, run in everyone)]
    names = ["run", "compared_in", "status", *settings, "seed", *(metric.key for metric in metrics)]
    rows = []
    for comparison, run in everyone:
        own = dict(zip(comparison.columns, comparison.settings_of(run), strict=True))
        numbers = [run.seed, *(metric.of(run) for metric in metrics)]
        texts = [run.name, comparison.title, run.status]
        texts += [own.get(column, run.setting(column) or "") for column in settings]
        texts += ["" if value is None else repr(value) for value in numbers]
        texts += [str(run.summary.get("device", "")), run.error or "", run.command]
        rows.append(tuple(map(Cell, texts)))
    return Table(tuple(map(Column, [*names, "device", "error", "command"])), tuple(rows))


def to_csv(table: Table) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([_csv_cell(column.heading) for column in table.columns])
    writer.writerows([_csv_cell(cell.text) for cell in row] for row in table.rows)
    return text.getvalue()


def _csv_cell(text: str) -> str:
    """In one line, with a leading apostrophe if a spreadsheet would read it as a formula. Numbers stay as they are."""
    line = printable(text)
    formula = line.startswith(("=", "+", "-", "@")) and parsed_number(line) is None and line != NOTHING.text
    return f"'{line}" if formula else line


def to_markdown(table: Table) -> str:
    def line(texts: Iterable[str]) -> str:
        return f"| {' | '.join(map(markdown, texts))} |\n"

    columns = table.columns
    head = line(f"{one.heading} ({one.unit})" if one.unit else one.heading for one in columns)
    rule = f"|{'|'.join('---:' if one.numeric else '---' for one in columns)}|\n"
    return (
        head
        + rule
        + "".join(line([cell.text for cell in row] + [""] * (len(columns) - len(row))) for row in table.rows)
    )


def markdown(text: str) -> str:
    """``text`` with everything escaped that Markdown, or HTML in it, would interpret."""
    line = printable(" ".join(text.split()))
    escaped = "".join(f"\\{letter}" if letter in "\\`*_[]|~" else letter for letter in line)
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _sortable(text: str) -> Cell:
    return Cell(text, parsed_number(text))


def _ending(run: Run) -> str:
    seed = "" if run.seed is None else f", seed {run.seed}"
    return f"{run.status} (run {run.name}{seed}){f': {run.error}' if run.error else ''}"


def _difference(rank: int, apart: Difference, metric: Metric) -> Cell:
    if rank == 0:
        return Cell("best", 0.0)
    size = abs(apart.value)
    if apart.within_noise:
        return Cell("no difference", size)
    return Cell(f"{'+' if apart.value >= 0 else '-'}{metric.text(size)}{' ?' if apart.std is None else ''}", size)


def _column(metric: Metric, shown: Sequence[Configuration]) -> tuple[Column, list[Cell]]:
    spreads = [one.spread(metric) for one in shown]
    scaled = scale([found.mean for found in spreads if found], metric.unit)
    text, unit, least = scaled.text, scaled.unit, 1e-9  # a deviation smaller than this share is rounding
    if metric not in COSTS:
        text, unit, least = metric.text, metric.unit if metric.unit not in metric.title else "", -1.0
    cells = []
    for found in spreads:
        varies = found and found.std is not None and found.std > least * abs(found.mean)
        about = f" ± {text(found.std or 0.0)}" if found and varies else ""
        cells.append(Cell(text(found.mean) + about, found.mean) if found else NOTHING)
    return Column(metric.title, "" if metric == QUALITIES[0] else unit, numeric=True), cells
