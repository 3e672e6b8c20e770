"""Tables, as cells of text with what they are sorted by, and their Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from hybridlm.errors import printable
from hybridlm.report.comparison import Comparison, Point
from hybridlm.report.facts import written_number
from hybridlm.report.measures import COSTS, EXACT, QUALITIES, Measure
from hybridlm.report.reading import Run
from hybridlm.report.repeat import command_of
from hybridlm.report.spread import Difference
from hybridlm.report.verdict import differences, quality_text

NOTHING = "-"
_STEPS: dict[str, tuple[tuple[float, str], ...]] = {
    "bytes": ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B")),
    "FLOP": ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1e3, "kFLOP"), (1, "FLOP")),
    "count": ((1e9, "billion"), (1e6, "million"), (1e3, "thousand"), (1, "")),
    "seconds": ((3600, "h"), (60, "min"), (1, "s")),
}


@dataclass(frozen=True)
class Cell:
    """order: what the column is sorted by: a number, or the text itself."""

    text: str
    order: float | str


@dataclass(frozen=True)
class Column:
    heading: str
    unit: str
    numeric: bool


@dataclass(frozen=True)
class Table:
    """Of a row with fewer cells than there are columns, the last cell reaches to the end."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Scale:
    """How the numbers of one column are written: divided by ``size``, with as many decimals as the smallest needs."""

    size: float
    unit: str
    decimals: int

    def text(self, value: float) -> str:
        return f"{value / self.size:,.{self.decimals}f}" if math.isfinite(value) else str(value)


def scale(values: Sequence[float], unit: str) -> Scale:
    """The largest unit in which no number is under 1, and three digits for the smallest of them."""
    sizes = [abs(value) for value in values if math.isfinite(value) and value != 0]
    least = min(sizes, default=1.0)
    steps = _STEPS.get(unit, ((1.0, unit),))
    size, name = next((step for step in steps if least >= step[0]), steps[-1])
    digits = math.floor(math.log10(least / size)) if least else 0
    whole = all(value == int(value) for value in sizes) and size == 1
    return Scale(size, name, 0 if whole else min(6, max(0, 2 - digits)))


def points_table(comparison: Comparison) -> Table:
    """A row per point, the best first, and behind them one for each run that has not finished."""
    points = comparison.points
    apart: list[Difference | None] = [*differences(comparison)]
    apart += [None] * (len(points) - len(apart))
    others = (
        [] if comparison.quality == QUALITIES[0] else [one for one in (*QUALITIES, EXACT) if _measured(one, points)]
    )
    qualities = [comparison.quality, *(one for one in others if one != comparison.quality)]
    columns = [Column("#", "", True), *(Column(name, "", False) for name in comparison.columns or ("run",))]
    rows: list[list[Cell]] = [[Cell(str(i), i), *_named(point)] for i, point in enumerate(points, 1)]
    for measure in qualities:
        unit = measure.unit if measure.unit not in measure.title else ""
        _column(
            columns,
            rows,
            Column(measure.title, "" if measure == QUALITIES[0] else unit, True),
            [_quality(p, measure) for p in points],
        )
        if measure == comparison.quality:
            _column(
                columns, rows, Column("to the best", "", True), [_apart(i, one, measure) for i, one in enumerate(apart)]
            )
            _column(
                columns,
                rows,
                Column("runs", "", True),
                [Cell(str(len(point.runs)), len(point.runs)) for point in points],
            )
    for measure in COSTS:
        if _measured(measure, points):
            heading, cells = _cost(measure, points)
            _column(columns, rows, heading, cells)
    lost = [
        (Cell(NOTHING, math.inf), *_lost_names(comparison, run), Cell(_what_became(run), math.inf))
        for run in comparison.lost
    ]
    return Table(tuple(columns), (*map(tuple, rows), *lost))


def runs_table(comparisons: Sequence[Comparison]) -> Table:
    """A row per run, finished or not, in full: what report.csv holds."""
    settings = tuple(dict.fromkeys(column for one in comparisons for column in one.columns))
    measures = [
        m for m in (*QUALITIES, EXACT, *COSTS) if any(m.of(run) is not None for one in comparisons for run in one.runs)
    ]
    names = [
        "run",
        "compared_in",
        "status",
        *settings,
        "seed",
        *(measure.key for measure in measures),
        "device",
        "error",
        "command",
    ]
    rows = []
    for comparison in comparisons:
        for run in comparison.runs:
            own = dict(zip(comparison.columns, comparison.settings_of(run), strict=True))
            texts = [
                run.name,
                comparison.title,
                run.status,
                *(own.get(column, run.setting(column) or "") for column in settings),
            ]
            numbers = [run.seed, *(measure.of(run) for measure in measures)]
            last = [str(run.summary.get("device", "")), run.error or "", command_of(run)]
            rows.append(
                tuple(Cell(text, text) for text in [*texts, *("" if n is None else repr(n) for n in numbers), *last])
            )
    return Table(tuple(Column(name, "", False) for name in names), tuple(rows))


def to_csv(table: Table) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([_csv_cell(column.heading) for column in table.columns])
    writer.writerows([_csv_cell(cell.text) for cell in row] for row in table.rows)
    return text.getvalue()


def _csv_cell(text: str) -> str:
    """In one line, and no formula to a spreadsheet: an apostrophe in front says that it is text. Numbers stay as they
    are."""
    line = printable(text)
    return (
        f"'{line}"
        if line.startswith(("=", "+", "-", "@")) and written_number(line) is None and line != NOTHING
        else line
    )


def to_markdown(table: Table) -> str:
    lines = [[f"{column.heading} ({column.unit})" if column.unit else column.heading for column in table.columns]]
    lines += [[cell.text for cell in row] + [""] * (len(table.columns) - len(row)) for row in table.rows]
    head, *body = ["| " + " | ".join(markdown(text) for text in line) + " |" for line in lines]
    return (
        "\n".join([head, "|" + "|".join("---:" if column.numeric else "---" for column in table.columns) + "|", *body])
        + "\n"
    )


def markdown(text: str) -> str:
    """``text`` with nothing in it that Markdown, or the HTML in it, would read."""
    escaped = "".join(
        f"\\{letter}" if letter in "\\`*_[]|~" else letter for letter in printable(" ".join(text.split()))
    )
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _column(columns: list[Column], rows: list[list[Cell]], column: Column, cells: list[Cell]) -> None:
    columns.append(column)
    for row, cell in zip(rows, cells, strict=True):
        row.append(cell)


def _measured(measure: Measure, points: Sequence[Point]) -> bool:
    return any(point.spread(measure) is not None for point in points)


def _named(point: Point) -> list[Cell]:
    return [_sortable(text) for text in point.settings or (point.name,)]


def _lost_names(comparison: Comparison, run: Run) -> list[Cell]:
    return [_sortable(text) for text in (comparison.settings_of(run) if comparison.columns else (run.name,))]


def _sortable(text: str) -> Cell:
    value = written_number(text)
    return Cell(text, text if value is None else value)


def _what_became(run: Run) -> str:
    seed = "" if run.seed is None else f", seed {run.seed}"
    return f"{run.status} (run {run.name}{seed}){f': {run.error}' if run.error else ''}"


def _quality(point: Point, measure: Measure) -> Cell:
    found = point.spread(measure)
    if found is None:
        return Cell(NOTHING, math.inf)
    about = "" if found.deviation is None else f" ± {quality_text(found.deviation, measure)}"
    return Cell(quality_text(found.mean, measure) + about, found.mean)


def _apart(index: int, apart: Difference | None, measure: Measure) -> Cell:
    if apart is None:
        return Cell(NOTHING, math.inf)
    if index == 0:
        return Cell("best", 0.0)
    sign = "+" if apart.value >= 0 else "-"
    text = "no difference" if apart.none else sign + quality_text(abs(apart.value), measure)
    return Cell(text + ("" if apart.within is not None or apart.none else " ?"), abs(apart.value))


def _cost(measure: Measure, points: Sequence[Point]) -> tuple[Column, list[Cell]]:
    spreads = [point.spread(measure) for point in points]
    scaled = scale([one.mean for one in spreads if one is not None], measure.unit)
    cells = []
    for one in spreads:
        if one is None:
            cells.append(Cell(NOTHING, math.inf))
            continue
        deviation = one.deviation or 0.0
        scatters = deviation > 1e-9 * abs(one.mean)  # what rounding leaves of equal numbers is none
        about = f" ± {scaled.text(deviation)}" if scatters else ""
        cells.append(Cell(scaled.text(one.mean) + about, one.mean))
    return Column(measure.title, scaled.unit, True), cells
