"""Quality against each cost, as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hybridlm.report.comparison import Comparison
from hybridlm.report.measures import TRADED, Measure
from hybridlm.report.plots.colours import COLOURS
from hybridlm.report.plots.drawing import Drawing, colour, draw, marker, point_legend, quality_label
from hybridlm.report.plots.labels import place
from hybridlm.report.plots.pareto import front
from hybridlm.report.spread import Spread
from hybridlm.report.table import Scale, scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LABELLED = 12  # of more points only those of the front get their name
_NAME_LETTERS = 26
_SAME = (
    0.01  # costs that differ by less than this share are no reason to choose; the memory of a process scatters so much
)
_SLIGHT = 0.05  # costs that differ by less than this share have an axis from zero


def tradeoffs(comparison: Comparison) -> Drawing | None:
    """Quality against each cost in which points differ, the Pareto front drawn; None where they differ in none."""
    costs = {measure: [cost.mean for cost, _ in _drawn(comparison, measure).values()] for measure in TRADED}
    panels = [measure for measure, found in costs.items() if _apart(found) > _SAME]
    if not panels:
        return None
    same = [measure.title for measure, found in costs.items() if len(found) > 1 and _apart(found) <= _SAME]

    def paint(figure: Figure, axes: list[Axes]) -> None:
        for axis, measure in zip(axes, panels, strict=True):
            _tradeoff(axis, comparison, measure)
        point_legend(figure, comparison)
        figure.draw_without_rendering()
        for axis, measure in zip(axes, panels, strict=True):
            _label(axis, comparison, measure)

    return draw(
        len(panels), paint, f"Within {_SAME:.0%} of each other, and not drawn: {', '.join(same)}." if same else ""
    )


def _apart(costs: Sequence[float]) -> float:
    """By which share the largest exceeds the smallest."""
    if not costs or max(costs) == min(costs):
        return 0.0
    return max(costs) / min(costs) - 1 if min(costs) > 0 else math.inf


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
            color=colour(index),
            marker=marker(index),
            markersize=6.5 if ranked else 5,
            elinewidth=0.8,
            linestyle="none",
            zorder=3 if ranked else 2,
        )
    pairs = sorted((drawn[index][0].mean, drawn[index][1].mean) for index in _front(drawn, comparison, measure))
    where = "pre" if measure.better == "more" else "post"
    axis.step(*zip(*pairs, strict=True), where=where, color="#555555", linestyle="--", linewidth=1, zorder=1)
    costs = [cost.mean for cost, _ in drawn.values()]
    label = f"{measure.title} ({scaled.unit}), {measure.better} is better"
    if _apart(costs) < _SLIGHT:  # an axis of their own would make much of little
        axis.set_xlim(0, 1.3 * max(costs))
        label += f"\nall within {_apart(costs):.1%} of the least"
    elif min(costs) > 0 and max(costs) / min(costs) > 20:
        axis.set_xscale("log")
    else:
        axis.margins(x=0.1)
        axis.locator_params(axis="x", nbins=6)  # long numbers beside each other
    axis.margins(y=0.1)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axis.set(xlabel=label, ylabel=quality_label(comparison.quality))


def _label(axis: Axes, comparison: Comparison, measure: Measure) -> None:
    """Names beside the points, once the axes have their places."""
    drawn = _drawn(comparison, measure)
    on_front = _front(drawn, comparison, measure)
    named = list(drawn) if len(drawn) <= _LABELLED else on_front
    first = [*on_front, *(index for index in named if index not in on_front)]
    order = list(drawn)
    names = [(order.index(index), _short(comparison.points[index].name, index)) for index in first]
    crosses = [
        (cost.mean, quality.mean, cost.deviation or 0.0, quality.deviation or 0.0) for cost, quality in drawn.values()
    ]
    place(axis, crosses, names)


def _scale(comparison: Comparison, measure: Measure) -> Scale:
    return scale(
        [cost.mean for point, _ in comparison.ranked() if (cost := point.spread(measure)) is not None], measure.unit
    )


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
    return [
        ranks[i] for i in front([(of_cost * cost.mean, of_quality * quality.mean) for cost, quality in drawn.values()])
    ]


def _short(name: str, index: int) -> str:
    return name if len(name) <= _NAME_LETTERS else f"#{index + 1}"
