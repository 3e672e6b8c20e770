"""Evaluations beside the validation: the records of eval.json, probes during training, and accuracy by length."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from hybridlm.report.comparison import Comparison
from hybridlm.report.metrics import Spread, spread
from hybridlm.report.run_files import JsonObject, number
from hybridlm.report.runs import Run
from hybridlm.report.table import NOTHING, Cell, Column, Table

_LENGTH_DIGITS = 16
_BY_LENGTH = re.compile(r"(?:val|probe)/(?P<name>.*(?:accuracy|exact).*?)[/@_]?(?P<length>\d+)")
ByLength = Mapping[int, Spread]


def accuracy_by_length(comparison: Comparison) -> dict[str, list[ByLength]]:
    """By title, the accuracy of each configuration by length, at the final validation, in probes and in eval.json.
    Titles of which no run has two lengths are left out."""
    found: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for run in comparison.runs:
        for title, length, share in _lengths(run):
            found[title][run.name][length] = share
    return {
        title: [_spreads([of_run.get(run.name, {}) for run in one.runs]) for one in comparison.configurations]
        for title, of_run in found.items()
        if any(len(lengths) > 1 for lengths in of_run.values())
    }


def _lengths(run: Run) -> Iterator[tuple[str, int, float]]:
    """(title, length in tokens, share of right answers), a later one replacing an earlier one."""
    found = []
    for key, value in {**(run.rows[-1] if run.rows else {}), **run.summary}.items():
        match = _BY_LENGTH.fullmatch(key)
        if match and len(match["length"]) < _LENGTH_DIGITS:
            found.append((match["name"].strip("/@_"), number(int(match["length"])), number(value)))
    for record in _objects(run.evaluation.get("results")):
        for row in _objects(record.get("curve")):
            found.append((f"accuracy, {record.get('what')}", number(row.get("length")), number(row.get("accuracy"))))
    for title, length, share in found:
        if length is not None and math.isfinite(length) and share is not None and 0 <= share <= 1:
            yield title, int(length), share


def _spreads(of_runs: Sequence[Mapping[int, float]]) -> ByLength:
    lengths = sorted({length for of_run in of_runs for length in of_run})
    spreads = {length: spread(of_run[length] for of_run in of_runs if length in of_run) for length in lengths}
    return {length: one for length, one in spreads.items() if one is not None}


def lengths_table(comparison: Comparison, values: Sequence[ByLength]) -> Table:
    """A row per configuration, a column per length. values: of each configuration, the accuracy by length."""
    lengths = sorted({length for by_length in values for length in by_length})
    rows = []
    for rank, (one, by_length) in enumerate(zip(comparison.configurations, values, strict=True), 1):
        cells = [_cell(by_length.get(length), ".3f", ".3f") for length in lengths]
        rows.append((Cell(str(rank), rank), Cell(one.name), *cells))
    columns = [Column("#", numeric=True), Column("configuration")]
    columns += [Column(f"{length}", "tokens", numeric=True) for length in lengths]
    return Table(tuple(columns), tuple(rows))


def evaluation_table(comparison: Comparison) -> Table | None:
    """A row per evaluation and metric, and per probe at the end of training, and a column per configuration. Of several
    records of one evaluation the last counts. None if there are none."""
    figures: dict[tuple[str, str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for index, one in enumerate(comparison.configurations):
        for run in one.runs:
            for key, value in dict(_evaluations(run)).items():
                figures[key][index].append(value)
    if not figures:
        return None
    evaluated = sorted({index for by_index in figures.values() for index in by_index})
    names = [comparison.configurations[index].name for index in evaluated]
    columns = [*map(Column, ("evaluation", "settings", "metric")), *(Column(name, numeric=True) for name in names)]
    rows = []
    for key, by_index in figures.items():
        spreads = [spread(by_index.get(index, [])) for index in evaluated]
        # Counts are written in full; the mean of small ones may lie between them.
        whole = [one is not None and (one.mean.is_integer() or abs(one.mean) >= 10_000) for one in spreads]
        cells = [_cell(one, ",.0f" if count else ",.5g", ".2g") for one, count in zip(spreads, whole, strict=True)]
        rows.append((*map(Cell, key), *cells))
    return Table(tuple(columns), tuple(rows))


def _evaluations(run: Run) -> Iterator[tuple[tuple[str, str, str], float]]:
    """((evaluation, settings, metric), value)."""
    for key, value in run.summary.items():
        if key.startswith("probe/") and (figure := number(value)) is not None:
            yield (key, "during training", ""), figure
    for record in _objects(run.evaluation.get("results")):
        settings, metrics = record.get("settings"), record.get("metrics")
        named = settings.items() if isinstance(settings, Mapping) else ()
        texts = ["EMA weights"] if record.get("ema") else []
        texts += [f"{key}={value}" for key, value in named if value not in (None, [])]
        for metric, value in metrics.items() if isinstance(metrics, Mapping) else ():
            if (figure := number(value)) is not None:
                yield (str(record.get("what")), ", ".join(texts), str(metric)), figure


def _objects(value: object) -> list[JsonObject]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _cell(found: Spread | None, mean_format: str, std_format: str) -> Cell:
    if found is None:
        return NOTHING
    about = "" if found.std is None else f" ± {found.std:{std_format}}"
    return Cell(f"{found.mean:{mean_format}}{about}", found.mean)
