"""What evaluations found beside the validation: records of eval.json, and shares by length."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from hybridlm.report.comparison import Comparison
from hybridlm.report.facts import Facts, number
from hybridlm.report.reading import Run
from hybridlm.report.spread import Spread, spread
from hybridlm.report.table import Cell, Column, Table

_LENGTH_DIGITS = 16
_BY_LENGTH = re.compile(r"(?:val|probe)/(?P<name>.*(?:accuracy|exact).*?)[/@_]?(?P<length>\d+)")


def lengthwise(runs: Sequence[Run]) -> dict[str, dict[str, dict[int, float]]]:
    """By title and by name of the run, shares of right answers by length: of the final validation, and of probes."""
    found: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        for key, value in {**(run.rows[-1] if run.rows else {}), **run.summary}.items():
            match, share = _BY_LENGTH.fullmatch(key), number(value)
            if match and share is not None and 0 <= share <= 1 and len(match["length"]) < _LENGTH_DIGITS:
                found[match["name"].strip("/@_")][run.name][int(match["length"])] = share
        for record in _records(run):
            for row in _dicts(record.get("curve")):
                length, share = number(row.get("length")), number(row.get("accuracy"))
                if length is not None and math.isfinite(length) and share is not None and 0 <= share <= 1:
                    found[f"accuracy, {record.get('what')}"][run.name][int(length)] = share
    return {
        title: dict(of_runs)
        for title, of_runs in found.items()
        if any(len(lengths) > 1 for lengths in of_runs.values())
    }


def evaluation_table(comparison: Comparison) -> Table | None:
    """A row per evaluation and metric, and per probe at the end of training, and a column per point; of several records
    of one evaluation the last. None where there is nothing."""
    figures: dict[tuple[str, str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for index, point in enumerate(comparison.points):
        for run in point.runs:
            probes = {key: number(value) for key, value in run.summary.items() if key.startswith("probe/")}
            latest = {(key, "in training", ""): value for key, value in probes.items() if value is not None}
            for record in _records(run):
                metrics = record.get("metrics")
                for metric, value in metrics.items() if isinstance(metrics, Mapping) else ():
                    if (figure := number(value)) is not None:
                        latest[str(record.get("what")), _settings(record), str(metric)] = figure
            for key, figure in latest.items():
                figures[key][index].append(figure)
    if not figures:
        return None
    evaluated = sorted({index for of_points in figures.values() for index in of_points})
    columns = [Column("evaluation", "", False), Column("settings", "", False), Column("metric", "", False)]
    columns += [Column(comparison.points[index].name, "", True) for index in evaluated]
    rows = []
    for key, of_points in figures.items():
        rows.append((*(Cell(text, text) for text in key), *(_cell(of_points.get(index, [])) for index in evaluated)))
    return Table(tuple(columns), tuple(rows))


def lengths_table(comparison: Comparison, values: Sequence[Mapping[int, Spread]]) -> Table:
    """A row per point, a column per length; values: of each point, a share by length."""
    lengths = sorted({length for of_point in values for length in of_point})
    columns = [
        Column("#", "", True),
        Column("point", "", False),
        *(Column(f"{length}", "tokens", True) for length in lengths),
    ]
    rows = []
    for index, (point, of_point) in enumerate(zip(comparison.points, values, strict=True), 1):
        cells = [_share(of_point.get(length)) for length in lengths]
        rows.append((Cell(str(index), index), Cell(point.name, point.name), *cells))
    return Table(tuple(columns), tuple(rows))


def _share(found: Spread | None) -> Cell:
    if found is None:
        return Cell("-", float("inf"))
    return Cell(f"{found.mean:.3f}" + ("" if found.deviation is None else f" ± {found.deviation:.3f}"), found.mean)


def _records(run: Run) -> Iterator[Facts]:
    yield from _dicts(run.evaluation.get("results"))


def _dicts(value: object) -> Iterator[Facts]:
    yield from (one for one in (value if isinstance(value, list) else []) if isinstance(one, dict))


def _settings(record: Facts) -> str:
    settings = record.get("settings")
    named = (
        [f"{key}={value}" for key, value in settings.items() if value not in (None, [])]
        if isinstance(settings, Mapping)
        else []
    )
    return ", ".join([*(["running average"] if record.get("ema") else []), *named])


def _cell(values: Sequence[float]) -> Cell:
    found = spread(values)
    if found is None:
        return Cell("-", float("inf"))
    whole = (
        found.mean.is_integer() or abs(found.mean) >= 10_000
    )  # counts in full; a mean of small ones may lie between them
    text = f"{found.mean:,.0f}" if whole else f"{found.mean:,.5g}"
    return Cell(text + ("" if found.deviation is None else f" ± {found.deviation:.2g}"), found.mean)
