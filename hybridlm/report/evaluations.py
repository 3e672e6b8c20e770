"""Evaluations beside the validation: the records of eval.json, probes during training, and accuracy by length."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from hybridlm.report.comparison import Comparison
from hybridlm.report.metrics import Spread, spread
from hybridlm.report.runs import JsonObject, Run, number
from hybridlm.report.table import NOTHING, Cell, Column, Table

_LENGTH_DIGITS = 16
_BY_LENGTH = re.compile(r"(?:val|probe)/(?P<name>.*(?:accuracy|exact).*?)[/@_]?(?P<length>\d+)")
ByLength = Mapping[int, Spread]
K = TypeVar("K")


def _spreads(comparison: Comparison, values: Callable[[Run], Iterator[tuple[K, float]]]) -> dict[K, dict[int, Spread]]:
    """By key and place of the configuration; of several values of a run the last counts."""
    found: dict[K, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for place, one in enumerate(comparison.configurations):
        for run in one.runs:
            for key, value in dict(values(run)).items():
                found[key][place].append(value)
    spreads = {key: {place: spread(of_runs) for place, of_runs in places.items()} for key, places in found.items()}
    return {key: {place: one for place, one in places.items() if one} for key, places in spreads.items()}


def accuracy_by_length(comparison: Comparison) -> dict[str, list[ByLength]]:
    """By title, the accuracy of each configuration by length, at the final validation, in probes and in eval.json.
    Titles of which no configuration has two lengths are left out."""
    spreads = _spreads(comparison, _lengths)
    found: dict[str, list[dict[int, Spread]]] = defaultdict(lambda: [{} for _ in comparison.configurations])
    for title, length in sorted(spreads, key=lambda key: key[1]):
        for place, one in spreads[title, length].items():
            found[title][place][length] = one
    titles = [title for title in dict.fromkeys(title for title, _ in spreads) if max(map(len, found[title])) > 1]
    return {title: [*found[title]] for title in titles}


def _lengths(run: Run) -> Iterator[tuple[tuple[str, int], float]]:
    """((title, length in tokens), share of right answers)."""
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
            yield (title, int(length)), share


def lengths_table(comparison: Comparison, values: Sequence[ByLength]) -> Table:
    """A row per configuration, a column per length. values: of each configuration, the accuracy by length."""
    lengths = sorted({length for by_length in values for length in by_length})
    columns = [Column("#", numeric=True), Column("configuration")]
    columns += [Column(f"{length}", "tokens", numeric=True) for length in lengths]
    rows = [
        (Cell(str(i), i), Cell(one.name), *(_cell(by_length.get(length), ".3f", ".3f") for length in lengths))
        for i, (one, by_length) in enumerate(zip(comparison.configurations, values, strict=True), 1)
    ]
    return Table(tuple(columns), tuple(rows))


def evaluation_table(comparison: Comparison) -> Table | None:
    """A row per evaluation and metric, and per probe at the end of training, and a column per configuration. Of several
    records of one evaluation the last counts. None if there are none."""
    spreads = _spreads(comparison, _evaluations)
    evaluated = sorted({place for places in spreads.values() for place in places})
    names = [comparison.configurations[place].name for place in evaluated]
    columns = [*map(Column, ("evaluation", "settings", "metric")), *(Column(name, numeric=True) for name in names)]
    rows = []
    for key, places in spreads.items():
        cells = [Cell(text) for text in key]
        for one in map(places.get, evaluated):
            # Counts are written in full; the mean of small ones may lie between them.
            whole = one is not None and (one.mean.is_integer() or abs(one.mean) >= 10_000)
            cells.append(_cell(one, ",.0f" if whole else ",.5g", ".2g"))
        rows.append(tuple(cells))
    return Table(tuple(columns), tuple(rows)) if rows else None


def _evaluations(run: Run) -> Iterator[tuple[tuple[str, str, str], float]]:
    """((evaluation, settings, metric), value)."""
    found = [((key, "during training", ""), value) for key, value in run.summary.items() if key.startswith("probe/")]
    for record in _objects(run.evaluation.get("results")):
        settings, metrics = record.get("settings"), record.get("metrics")
        named = settings.items() if isinstance(settings, Mapping) else ()
        texts = ["EMA weights"] if record.get("ema") else []
        texts += [f"{key}={value}" for key, value in named if value not in (None, [])]
        for metric, value in metrics.items() if isinstance(metrics, Mapping) else ():
            found.append(((str(record.get("what")), ", ".join(texts), str(metric)), value))
    for key, value in found:
        if (figure := number(value)) is not None:
            yield key, figure


def _objects(value: object) -> list[JsonObject]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _cell(found: Spread | None, mean_format: str, std_format: str) -> Cell:
    if found is None:
        return NOTHING
    about = "" if found.std is None else f" ± {found.std:{std_format}}"
    return Cell(f"{found.mean:{mean_format}}{about}", found.mean)
