"""Lines, as SVG: learning curves, shares by length, quality by a setting."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hybridlm.report.comparison import Comparison, Point
from hybridlm.report.facts import written_number
from hybridlm.report.measures import Measure
from hybridlm.report.plots.curves import Mark, curve, metric_drawn
from hybridlm.report.plots.drawing import legend, line, new_figure, point_legend, quality_label, to_svg, within_shares
from hybridlm.report.spread import Spread, spread
from hybridlm.report.table import scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TICKS = 10  # of more values the axis has ticks of its own


def learning(comparison: Comparison) -> str | None:
    """Learning curves by tokens and by seconds; None where no run was measured twice on its way."""
    metric = metric_drawn([run for point in comparison.points for run in point.runs], comparison.quality.key)
    curves = [marks if len(marks := curve(point.runs, metric)) > 1 else [] for point in comparison.points]
    if not any(curves):
        return None
    with new_figure(1, 2) as (figure, axes):
        tokens = scale([max(mark.tokens for mark in marks) for marks in curves if marks], "count")
        seconds = scale([max(mark.seconds for mark in marks) for marks in curves if marks] or [1.0], "seconds")
        for index in reversed(range(len(curves))):
            if curves[index]:
                _curve(axes[0], index, curves[index], [mark.tokens / tokens.size for mark in curves[index]])
                _curve(axes[1], index, curves[index], [mark.seconds / seconds.size for mark in curves[index]])
        unit = f"tokens trained on ({tokens.unit})" if tokens.unit else "tokens trained on"
        axes[0].set(xlabel=unit, ylabel=_metric_label(metric, comparison.quality))
        axes[1].set(xlabel=f"time of training ({seconds.unit})")
        for axis in axes:
            axis.set_xlim(left=0)
            if comparison.quality.better == "less" or metric != comparison.quality.key:
                axis.set_ylim(*_interesting(curves))
            else:
                within_shares(axis, comparison.quality)
        axes[1].sharey(axes[0])
        point_legend(figure, comparison)
        return to_svg(figure)


def by_length(comparison: Comparison, title: str, values: Sequence[Mapping[int, Spread]]) -> str:
    """values: of each point, a share (0 to 1) by length."""
    with new_figure(1, 1) as (figure, axes):
        axis = axes[0]
        for index in reversed(range(len(values))):
            lengths = sorted(values[index])
            if lengths:
                means = [values[index][length].mean for length in lengths]
                line(axis, index, [float(length) for length in lengths], means, [values[index][length].deviation for length in lengths])
        axis.set_xscale("log", base=2)
        _ticks(axis, sorted({float(length) for of_point in values for length in of_point}))
        axis.set(xlabel="length (tokens)", ylabel=f"{title} (share of 1)", ylim=(-0.02, 1.02))
        point_legend(figure, comparison)
        return to_svg(figure)


def by_setting(comparison: Comparison, column: str) -> str:
    """Quality by the setting ``column``, a line for each combination of the other settings, the one with the best point first."""
    lines: dict[str, list[tuple[float, Spread]]] = defaultdict(list)
    place = comparison.columns.index(column)
    for point, quality in comparison.ranked():
        lines[comparison.name_of(point.settings, (column, *comparison.tuned))].append((float(point.settings[place]), quality))
    with new_figure(1, 1) as (figure, (axis,)):
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
        return to_svg(figure)


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
            length: spread(value for run in point.runs if (value := read.get(run.name, {}).get(length)) is not None) for length in lengths
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


def _metric_label(metric: str, quality: Measure) -> str:
    if metric == quality.key:
        return f"{quality.title}, validation"
    return "bits per byte, training" if metric == "train/bpb" else "loss, training (nats/target)"


def _interesting(curves: Sequence[Sequence[Mark]]) -> tuple[float, float]:
    """Ends of an axis of losses: the first quarter of each curve may lie above, and so may one that diverges, so that the rest is not
    flattened."""
    later = [mark.value.mean for marks in curves for mark in marks if mark.tokens >= marks[-1].tokens / 4]
    low, middle, high = min(later), sorted(later)[len(later) // 2], max(later)
    high = min(high, max(low, 2 * middle))
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room
