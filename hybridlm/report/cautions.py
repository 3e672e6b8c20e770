"""What keeps a ranking of small, short runs from being a finding, as sentences."""

from __future__ import annotations

from collections import defaultdict

from hybridlm.report.comparison import Comparison, Point, some
from hybridlm.report.facts import number, written_number
from hybridlm.report.measures import TOKENS
from hybridlm.report.reading import Run
from hybridlm.report.table import scale

_WHOLE = 0.95  # of the training text; who has seen so much has seen it
_ALIKE = 0.01  # tokens that differ by less than this share: the last step of a schedule, rounded
Settings = frozenset[tuple[str, str]]
_RATES = ("optim.lr", "optim.lr_scale.", "optim.muon.lr")


def cautions(comparison: Comparison) -> list[str]:
    """Of what was ranked; of a run alone only what concerns one."""
    finished = [run for point in (*comparison.points, *comparison.passed_over) for run in point.runs]
    said = [_little(finished)]
    if len(comparison.points) > 1:
        said += [_lengths(comparison), *_rates(comparison)]
    return [sentence for sentence in said if sentence]


def passes(run: Run) -> float | None:
    """Over the training text, when the last metrics were logged; None of a generated task, or where nothing was
    logged."""
    if run.config.get("data.source") == "synthetic":
        return None
    return next((found for row in reversed(run.rows) if (found := number(row.get("data/epoch"))) is not None), None)


def share(value: float) -> str:
    """In per cent, with two digits where they matter."""
    return f"{value:.0%}" if value >= 0.1 else f"{100 * value:.2g}%"


def _little(runs: list[Run]) -> str:
    seen = [found for run in runs if (found := passes(run)) is not None]
    little = sorted(found for found in seen if found < _WHOLE)
    if not little:
        return ""
    shares = list(dict.fromkeys(map(share, (little[0], little[-1]))))
    text = f"{' to '.join(shares)} of the training text"
    if len(runs) == 1:
        return f"This run saw {text}: longer training (trainer.max_steps) is likely to give a better model."
    who = "These runs" if len(little) == len(runs) else f"{len(little)} of these {len(runs)} runs"
    return f"{who} saw {text}: what is best after so little need not be best after longer training."


def _lengths(comparison: Comparison) -> str:
    """Of training; a point that has seen more is better for it."""
    tokens = [found.mean for point in comparison.points if (found := point.spread(TOKENS)) is not None]
    if not tokens or max(tokens) <= (1 + _ALIKE) * min(tokens):
        return ""
    scaled = scale(tokens, "count")
    ends = f"{scaled.text(min(tokens))} to {scaled.text(max(tokens))}{f' {scaled.unit}' if scaled.unit else ''}"
    return (
        f"The points were trained on different numbers of tokens ({ends}): part of what tells them apart is the length"
        " of training."
    )


def _rates(comparison: Comparison) -> list[str]:
    """Whether each model had its own learning rate: another one may turn the order around."""
    models: dict[Settings, list[Point]] = defaultdict(list)
    for point in (*comparison.points, *comparison.passed_over):
        models[_without_rates(point)].append(point)
    if len(models) < 2:
        return []
    single = [points[0] for points in models.values() if len({_rates_of(point) for point in points}) == 1]
    if len(single) == len(models):
        return [_one_rate(single)]
    said = [f"One learning rate only: {some([point.name for point in single])}."] if single else []
    return said + [
        end for column in comparison.tuned if column.startswith(_RATES) and (end := _end(comparison, column))
    ]


def _one_rate(points: list[Point]) -> str:
    first = points[0].runs[0]
    field = "optim.muon.lr" if first.setting("optim.name") == "muon" else "optim.lr"
    value = written_number(first.setting(field) or "")
    if len({_rates_of(point) for point in points}) > 1:
        said = "Each point had one learning rate"
    else:
        said = f"One learning rate{f' ({field}={value:g})' if value else ''} served all points"
    tries = f"{field}={','.join(f'{value * factor:g}' for factor in (0.5, 1, 2))}" if value else field
    return f"{said}: a point may lose by its rate alone. Try several for each ({tries}), and add --best-of {field}."


def _end(comparison: Comparison, column: str) -> str:
    """Points whose best rate is the smallest or the largest that was tried for them: a better one may lie beyond."""
    place = comparison.columns.index(column)

    def others(point: Point) -> tuple[str, ...]:
        return point.settings[:place] + point.settings[place + 1 :]

    tried: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for point in (*comparison.points, *comparison.passed_over):
        if (value := written_number(point.settings[place])) is not None:
            tried[others(point)].append(value)
    found = []
    for point in comparison.points:
        own, values = written_number(point.settings[place]), tried[others(point)]
        if own is not None and len(set(values)) > 1 and own in (min(values), max(values)):
            found.append(f"{point.name} ({'smallest' if own == min(values) else 'largest'})")
    return (
        f"The best {column} is at an end of those tried, and a better one may lie beyond: {some(found)}."
        if found
        else ""
    )


def _without_rates(point: Point) -> Settings:
    return frozenset(item for item in point.identity if not item[0].startswith(_RATES))


def _rates_of(point: Point) -> Settings:
    return point.identity - _without_rates(point)
