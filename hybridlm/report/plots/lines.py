"""Lines, as SVG: learning curves, shares by length, quality by a setting."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hybridlm.report.comparison import Comparison, Point, some
from hybridlm.report.facts import written_number
from hybridlm.report.plots.curves import SMOOTHING, Mark, curve, interesting, metric_drawn
from hybridlm.report.plots.drawing import (
    Drawing,
    draw,
    legend,
    line,
    metric_label,
    point_legend,
    quality_label,
    tokens_label,
    within_shares,
)
from hybridlm.report.spread import Spread, spread
from hybridlm.report.table import scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TICKS = 10  # of more values the axis has ticks of its own


def learning(comparison: Comparison) -> Drawing | None:
    """Learning curves by tokens and by seconds; None where no run was measured twice on its way."""
    quality = comparison.quality
    metric = metric_drawn([point.runs for point in comparison.points], quality.key)
    curves = [marks if len(marks := curve(point.runs, metric)) > 1 else [] for point in comparison.points]
    if not any(curves):
        return None
    tokens = scale([max(mark.tokens for mark in marks) for marks in curves if marks], "count")
    seconds = scale([max(mark.seconds for mark in marks) for marks in curves if marks], "seconds")

    def paint(figure: Figure, axes: list[Axes]) -> None:
        for index in reversed(range(len(curves))):
            if curves[index]:
                _curve(axes[0], index, curves[index], [mark.tokens / tokens.size for mark in curves[index]])
                _curve(axes[1], index, curves[index], [mark.seconds / seconds.size for mark in curves[index]])
        axes[0].set(xlabel=tokens_label(tokens))
        axes[1].set(xlabel=f"time of training ({seconds.unit})")
        for axis in axes:
            axis.set(ylabel=metric_label(metric, quality))
            axis.set_xlim(left=0)
            if quality.better == "less" or metric != quality.key:
                axis.set_ylim(
                    *interesting([[(mark.tokens, mark.value.mean) for mark in marks] for marks in curves if marks])
                )
            else:
                within_shares(axis, quality)
        point_legend(figure, comparison)

    return draw(2, paint, _measured(comparison, metric, curves))


def by_length(comparison: Comparison, title: str, values: Sequence[Mapping[int, Spread]]) -> Drawing:
    """values: of each point, a share (0 to 1) by length."""

    def paint(figure: Figure, axes: list[Axes]) -> None:
        axis = axes[0]
        for index in reversed(range(len(values))):
            lengths = sorted(values[index])
            if lengths:
                means = [values[index][length].mean for length in lengths]
                line(
                    axis,
                    index,
                    [float(length) for length in lengths],
                    means,
                    [values[index][length].deviation for length in lengths],
                )
        axis.set_xscale("log", base=2)
        _ticks(axis, sorted({float(length) for of_point in values for length in of_point}))
        axis.set(xlabel="length (tokens)", ylabel=f"{title} (share of 1)", ylim=(-0.02, 1.02))
        point_legend(figure, comparison)

    return draw(1, paint)


def by_setting(comparison: Comparison, column: str) -> Drawing:
    """Quality by the setting ``column``, a line for each combination of the other settings, the one with the best point
    first."""
    lines: dict[str, list[tuple[float, Spread]]] = defaultdict(list)
    place = comparison.columns.index(column)
    for point, quality in comparison.ranked():
        lines[comparison.name_of(point.settings, (column, *comparison.tuned))].append(
            (float(point.settings[place]), quality)
        )

    def paint(figure: Figure, axes: list[Axes]) -> None:
        axis = axes[0]
        for index, marks in reversed(list(enumerate(lines.values()))):
            places, values = zip(*sorted(marks, key=lambda mark: mark[0]), strict=True)
            line(axis, index, places, [value.mean for value in values], [value.deviation for value in values])
        values_drawn = sorted({place for marks in lines.values() for place, _ in marks})
        if values_drawn[0] > 0 and values_drawn[-1] >= 4 * values_drawn[0]:
            axis.set_xscale("log")
        _ticks(axis, values_drawn)
        axis.set(xlabel=column, ylabel=quality_label(comparison.quality))
        within_shares(axis, comparison.quality)
        if any(lines):  # a single line of which nothing else was varied has no name
            legend(figure, list(lines))

    return draw(1, paint)


def numeric_settings(comparison: Comparison) -> list[str]:
    """Columns worth a plot: numbers, three or more of them, of which some line has two or more."""
    ranked, found = [point for point, _ in comparison.ranked()], []
    for place, column in enumerate(comparison.columns):
        values = [written_number(point.settings[place]) for point in ranked]
        others = Counter(comparison.name_of(point.settings, (column, *comparison.tuned)) for point in ranked)
        if column not in comparison.tuned and None not in values and len(set(values)) > 2 and max(others.values()) > 1:
            found.append(column)
    return found


def shares(points: Sequence[Point], read: Mapping[str, Mapping[int, float]]) -> list[dict[int, Spread]]:
    """Of each point the spread over its runs; read: by run name, a share by length."""
    found = []
    for point in points:
        lengths = {length for run in point.runs for length in read.get(run.name, {})}
        spreads = {
            length: spread(value for run in point.runs if (value := read.get(run.name, {}).get(length)) is not None)
            for length in lengths
        }
        found.append({length: one for length, one in spreads.items() if one is not None})
    return found


def _ticks(axis: Axes, places: Sequence[float]) -> None:
    """At the places themselves, unless there are many."""
    if len(places) <= _TICKS:
        axis.set_xticks(places)
        axis.minorticks_off()
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _curve(axis: Axes, index: int, marks: Sequence[Mark], places: Sequence[float]) -> None:
    line(axis, index, places, [mark.value.mean for mark in marks], [mark.value.deviation for mark in marks])


def _measured(comparison: Comparison, metric: str, curves: Sequence[Sequence[Mark]]) -> str:
    """What the curves are of, and which points have none."""
    missing = [point.name for point, marks in zip(comparison.points, curves, strict=True) if not marks]
    without = f" Measured less than twice, and not drawn: {some(missing)}." if missing else ""
    if metric == comparison.quality.key:
        return f"Of validations.{without}"
    return f"Of training, as not every run was validated twice on its way; each value is a {SMOOTHING}.{without}"
