"""Tables of a report: of configurations, of one run's settings, of all runs; as Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hybridlm.errors import printable
from hybridlm.report.comparison import Comparison, Configuration
from hybridlm.report.metrics import COSTS, EXACT, QUALITIES, Difference, Metric, scale
from hybridlm.report.runs import Run, number, parsed_number
from hybridlm.report.verdict import differences, epochs, percent


@dataclass(frozen=True)
class Cell:
    """value: what the column is sorted by; None: the text."""

    text: str
    value: float | None = None


NOTHING = Cell("-", math.inf)
# Fields of config.yaml in the order of the table.
_FIELDS = {
    "model": "model.name",
    "size": "size.name",
    "pattern": "model.pattern",
    "layers": "model.n_layers",
    "width": "model.d_model",
    "data": "data.source",
    "texts": "data.path",
    "task": "data.synthetic.task",
    "tokenizer": "data.tokenizer.kind",
    "sequence length": "data.seq_len",
    "sequences per step": "data.global_batch",
    "steps": "trainer.max_steps",
    "optimizer": "optim.name",
    "learning rate": "optim.lr",
    "learning rate of Muon": "optim.muon.lr",
    "schedule": "optim.schedule",
    "warm-up": "optim.warmup",
    "weight decay": "optim.weight_decay",
    "precision": "trainer.precision",
    "seed": "seed",
}


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
    for name in comparison.columns or ("run",):
        columns.append((Column(name), [_sortable(one.settings.get(name, one.name)) for one in shown]))
    columns.append(_column(quality, shown))
    apart = [_difference(i, one, quality) for i, one in enumerate(differences(comparison))]
    columns.append((Column("vs best", numeric=True), apart + [NOTHING] * (len(shown) - len(apart))))
    columns.append((Column("runs", numeric=True), [Cell(str(len(one.runs)), len(one.runs)) for one in shown]))
    others = () if quality == QUALITIES[0] else (*QUALITIES, EXACT)
    for metric in [one for one in (*others, *COSTS) if one != quality]:
        if any(one.spread(metric) is not None for one in shown):
            columns.append(_column(metric, shown))
    unfinished = [
        (NOTHING, *map(_sortable, comparison.settings_of(run).values() or (run.name,)), Cell(_ending(run), math.inf))
        for run in comparison.unfinished
    ]
    rows = zip(*(cells for _, cells in columns), strict=True)
    return Table(tuple(heading for heading, _ in columns), (*rows, *unfinished))


def setup_table(run: Run) -> Table:
    """Of a run shown alone: a row per setting with its field, then one per figure."""
    generated, muon = run.config.get("data.source") == "synthetic", run.setting("optim.name") == "muon"
    left_out = [*(("texts", "tokenizer") if generated else ("task",)), *(() if muon else ("learning rate of Muon",))]
    rows = [
        (title, run.setting(field) or "", field)
        for title, field in _FIELDS.items()
        if title not in left_out and run.setting(field) not in (None, "null", "")
    ]
    for metric in COSTS:
        if (value := metric.of(run)) is not None:
            scaled = scale([value], metric.unit)
            rows.append((metric.title, f"{scaled.text(value)} {scaled.unit}".strip(), ""))
    if (steps := number(run.summary.get("steps"))) is not None:
        rows.append(("steps done", f"{steps:,.0f}", ""))
    if (seen := epochs(run)) is not None:
        rows.append(("training text seen", percent(seen) if seen < 1 else f"{seen:.2f} times", ""))
    if run.rows and (skipped := number(run.rows[-1].get("optim/skipped_steps"))) is not None:
        rows.append(("skipped steps", f"{skipped:.0f}", ""))
    rows += [(key, str(run.summary[key]), "") for key in ("device", "torch") if run.summary.get(key)]
    return Table(tuple(map(Column, ("setting", "value", "field"))), tuple(tuple(map(Cell, row)) for row in rows))


def to_csv(comparisons: Sequence[Comparison]) -> str:
    """report.csv: a row per run, finished or not, with full precision."""
    settings = tuple(dict.fromkeys(column for one in comparisons for column in one.columns))
    everyone = [(comparison, run) for comparison in comparisons for run in comparison.runs]
    metrics = [one for one in (*QUALITIES, EXACT, *COSTS) if any(one.of(run) is not None for _, run in everyone)]
    names = ["run", "compared_in", "status", *settings, "seed", *(metric.key for metric in metrics)]
    rows = [[*names, "device", "error", "command"]]
    for comparison, run in everyone:
        own = comparison.settings_of(run)
        texts = [run.name, comparison.title, run.status]
        texts += [own.get(column, run.setting(column) or "") for column in settings]
        texts += ["" if value is None else repr(value) for value in (run.seed, *(one.of(run) for one in metrics))]
        rows.append([*texts, str(run.summary.get("device", "")), run.error or "", run.command])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(map(csv_cell, row) for row in rows)
    return text.getvalue()


def csv_cell(text: str) -> str:
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
