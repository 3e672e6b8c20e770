"""The plots, as SVG. A point has one colour and one marker in all of them, by its rank; from the eighth on points are grey."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hybridlm.report.comparison import Comparison, Point
from hybridlm.report.curves import Mark, curve, metric_drawn
from hybridlm.report.labels import place
from hybridlm.report.measures import TRADED, Measure
from hybridlm.report.pareto import front
from hybridlm.report.spread import Spread, spread
from hybridlm.report.table import Scale, scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito, "Color Universal Design" (jfly.uni-koeln.de/color), without its yellow, which is too light for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#8a8a8a"
_LABELLED = 12  # of more points only those of the front get their name
_NAME_LETTERS = 26
_SETTINGS = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "text.parse_math": False,  # a name may hold a dollar sign
    "svg.hashsalt": "hybridlm",
}


def tradeoffs(comparison: Comparison) -> str | None:
    """Quality against each cost in which points differ, the Pareto front drawn; None where they differ in none."""
    panels = [measure for measure in TRADED if len({cost.mean for cost, _ in _drawn(comparison, measure).values()}) > 1]
    if not panels:
        return None
    rows, columns = (1, len(panels)) if len(panels) < 3 else (2, 2)
    with _figure(rows, columns) as (figure, axes):
        for axis, measure in zip(axes, panels, strict=False):
            _tradeoff(axis, comparison, measure)
        for axis in axes[len(panels) :]:
            axis.remove()
        _legend(figure, axes[0], comparison)
        figure.draw_without_rendering()
        for axis, measure in zip(axes, panels, strict=False):
            _label(axis, comparison, measure)
        return _svg(figure)


def learning(comparison: Comparison) -> str | None:
    """Learning curves by tokens and by seconds; None where no run was measured twice on its way."""
    metric = metric_drawn([run for point in comparison.points for run in point.runs], comparison.quality.key)
    curves = [marks if len(marks := curve(point.runs, metric)) > 1 else [] for point in comparison.points]
    if not any(curves):
        return None
    with _figure(1, 2) as (figure, axes):
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
        axes[1].sharey(axes[0])
        _legend(figure, axes[0], comparison)
        return _svg(figure)


def by_length(comparison: Comparison, title: str, values: Sequence[Mapping[int, Spread]]) -> str:
    """values: of each point, a share (0 to 1) by length."""
    with _figure(1, 1) as (figure, axes):
        axis = axes[0]
        for index in reversed(range(len(values))):
            lengths = sorted(values[index])
            if lengths:
                means = [values[index][length].mean for length in lengths]
                _line(axis, index, [float(length) for length in lengths], means, [values[index][length].deviation for length in lengths])
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set(xlabel="length (tokens)", ylabel=f"{title} (share of 1)", ylim=(-0.02, 1.02))
        _legend(figure, axis, comparison)
        return _svg(figure)


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


def _tradeoff(axis: Axes, comparison: Comparison, measure: Measure) -> None:
    scaled = _scale(comparison, measure)
    drawn = _drawn(comparison, measure)
    for index, (cost, quality) in reversed(drawn.items()):
        ranked = index < len(COLOURS)
        axis.errorbar(
            cost.mean,
            quality.mean,
            xerr=cost.deviation if ranked else None,
            yerr=quality.deviation if ranked else None,
            color=_colour(index),
            marker=_marker(index),
            markersize=6.5 if ranked else 5,
            elinewidth=0.8,
            linestyle="none",
            zorder=3 if ranked else 2,
        )
    pairs = sorted((drawn[index][0].mean, drawn[index][1].mean) for index in _front(drawn, comparison, measure))
    where = "pre" if measure.better == "more" else "post"
    axis.step(*zip(*pairs, strict=True), where=where, color="#555555", linestyle="--", linewidth=1, zorder=1)
    costs = [cost.mean for cost, _ in drawn.values()]
    if min(costs) > 0 and max(costs) / min(costs) > 20:
        axis.set_xscale("log")
    else:
        axis.margins(x=0.1)
    axis.margins(y=0.1)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axis.set(xlabel=f"{measure.title} ({scaled.unit}), {measure.better} is better", ylabel=_quality_label(comparison.quality))


def _label(axis: Axes, comparison: Comparison, measure: Measure) -> None:
    """Names beside the points, once the axes have their places."""
    drawn = _drawn(comparison, measure)
    on_front = _front(drawn, comparison, measure)
    named = list(drawn) if len(drawn) <= _LABELLED else on_front
    first = [*on_front, *(index for index in named if index not in on_front)]
    order = list(drawn)
    names = [(order.index(index), _short(comparison.points[index].name, index)) for index in first]
    crosses = [(cost.mean, quality.mean, cost.deviation or 0.0, quality.deviation or 0.0) for cost, quality in drawn.values()]
    place(axis, crosses, names)


def _scale(comparison: Comparison, measure: Measure) -> Scale:
    return scale([cost.mean for point, _ in comparison.ranked() if (cost := point.spread(measure)) is not None], measure.unit)


def _drawn(comparison: Comparison, measure: Measure) -> dict[int, tuple[Spread, Spread]]:
    """By rank, (cost in the unit of the axis, quality) of the points that have both."""
    found, size = {}, _scale(comparison, measure).size
    for index, (point, quality) in enumerate(comparison.ranked()):
        if (cost := point.spread(measure)) is not None:
            deviation = None if cost.deviation is None else cost.deviation / size
            found[index] = (Spread(cost.mean / size, deviation, cost.n), quality)
    return found


def _front(drawn: Mapping[int, tuple[Spread, Spread]], comparison: Comparison, measure: Measure) -> list[int]:
    """Ranks of the points on the front."""
    of_cost, of_quality = (-1.0 if one.better == "more" else 1.0 for one in (measure, comparison.quality))
    ranks = list(drawn)
    return [ranks[i] for i in front([(of_cost * cost.mean, of_quality * quality.mean) for cost, quality in drawn.values()])]


def _curve(axis: Axes, index: int, marks: Sequence[Mark], places: Sequence[float]) -> None:
    _line(axis, index, places, [mark.value.mean for mark in marks], [mark.value.deviation for mark in marks])


def _line(axis: Axes, index: int, places: Sequence[float], means: Sequence[float], deviations: Sequence[float | None]) -> None:
    ranked = index < len(COLOURS)
    axis.plot(
        places,
        means,
        color=_colour(index),
        marker=_marker(index) if ranked and len(places) <= 30 else None,
        markersize=4,
        linewidth=1.6 if ranked else 0.7,
        zorder=3 if ranked else 1,
    )
    if ranked and any(deviations):
        low = [mean - (deviation or 0.0) for mean, deviation in zip(means, deviations, strict=True)]
        high = [mean + (deviation or 0.0) for mean, deviation in zip(means, deviations, strict=True)]
        axis.fill_between(places, low, high, color=_colour(index), alpha=0.15, linewidth=0)


def _legend(figure: Figure, axis: Axes, comparison: Comparison) -> None:
    """Under the axes: the points with a colour by rank, and what the others are."""
    from matplotlib.lines import Line2D

    count = len(comparison.points)
    handles = [
        Line2D([], [], color=colour, marker=marker, linewidth=1.6, label=f"{i} {_cut(point.name, 60)}")
        for i, (colour, marker, point) in enumerate(zip(COLOURS, MARKERS, comparison.points, strict=False), 1)
    ]
    if count > len(COLOURS):
        handles.append(Line2D([], [], color=GREY, marker=".", linewidth=0.7, label=f"{len(COLOURS) + 1} to {count} of the table"))
    longest = max(len(str(handle.get_label())) for handle in handles)
    figure.legend(handles=handles, loc="outside lower left", ncols=max(1, min(4, 120 // (longest + 8))), frameon=False, handlelength=1.8)


def _quality_label(quality: Measure) -> str:
    return f"{quality.title}, {quality.better} is better"


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


def _short(name: str, index: int) -> str:
    return name if len(name) <= _NAME_LETTERS else f"#{index + 1}"


def _cut(name: str, letters: int) -> str:
    return name if len(name) <= letters else name[: letters - 3] + "..."


def _colour(index: int) -> str:
    return COLOURS[index] if index < len(COLOURS) else GREY


def _marker(index: int) -> str:
    return MARKERS[index] if index < len(MARKERS) else "."


@contextmanager
def _figure(rows: int, columns: int) -> Iterator[tuple[Figure, list[Axes]]]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(11.0 if columns > 1 else 7.0, 3.6 * rows + 0.6), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
        yield figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
