"""Quality against each cost, with the Pareto front."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from hybridlm.report.comparison import Comparison
from hybridlm.report.metrics import TRADED, Metric, Scale, Spread, scale
from hybridlm.report.plots.curves import numbered_legend
from hybridlm.report.plots.drawing import COLOURS, Drawing, colour, draw, marker

_MAX_LABELS = 12  # with more configurations only those on the front are labelled
_NAME_CHARACTERS = 26
_SAME = 0.01  # costs closer than this share do not matter; the memory of a process varies by as much
_SLIGHT = 0.05  # costs closer than this share get an axis from zero
_MARKER_ROOM = 4.0  # pixels on each side of a marker's centre
_DISTANCES = (7.0, 13.0, 20.0)  # of a label from its marker, in typographic points
# (right, up, horizontal alignment, vertical alignment), the preferred one first
_DIRECTIONS: tuple[tuple[float, float, Literal["left", "right", "center"], Literal["bottom", "top", "center"]], ...] = (
    (0.6, 0.6, "left", "bottom"),
    (0.6, -0.6, "left", "top"),
    (-0.6, 0.6, "right", "bottom"),
    (-0.6, -0.6, "right", "top"),
    (1.0, 0.0, "left", "center"),
    (-1.0, 0.0, "right", "center"),
    (0.0, 1.0, "center", "bottom"),
    (0.0, -1.0, "center", "top"),
)
Costs = Mapping[int, tuple[Spread, Spread]]  # by rank: (cost in the unit of the axis, quality)


def tradeoffs(comparison: Comparison) -> Drawing | None:
    """Quality against each cost in which the configurations differ; None if they differ in none."""
    found = {metric: _costs(comparison, metric) for metric in TRADED}
    costs = {metric: of_metric for metric, (_, of_metric) in found.items()}
    panels = [metric for metric in TRADED if _range(costs[metric]) > _SAME]
    if not panels:
        return None
    same = [metric.title for metric in TRADED if len(costs[metric]) > 1 and metric not in panels]

    def paint(figure: Figure, axes: list[Axes]) -> None:
        fronts = [_front(costs[metric], metric, comparison.quality) for metric in panels]
        for axis, metric, front in zip(axes, panels, fronts, strict=True):
            _plot(axis, costs[metric], front, metric, found[metric][0].unit)
            axis.set(ylabel=comparison.quality.label)
        numbered_legend(figure, comparison)
        figure.draw_without_rendering()  # gives the axes their places
        for axis, metric, front in zip(axes, panels, fronts, strict=True):
            drawn = costs[metric]
            first = [*front, *(() if len(drawn) > _MAX_LABELS else (rank for rank in drawn if rank not in front))]
            ranks, names = list(drawn), [one.name for one in comparison.configurations]
            labels = [names[rank] if len(names[rank]) <= _NAME_CHARACTERS else f"#{rank + 1}" for rank in first]
            crosses = [
                (cost.mean, quality.mean, cost.std or 0.0, quality.std or 0.0) for cost, quality in drawn.values()
            ]
            place_labels(axis, crosses, list(zip(map(ranks.index, first), labels, strict=True)))

    return draw(len(panels), paint, f"Equal within {_SAME:.0%}, not drawn: {', '.join(same)}." if same else "")


def _range(costs: Costs) -> float:
    """The share by which the largest cost exceeds the smallest."""
    means = [cost.mean for cost, _ in costs.values()] or [0.0]
    if max(means) == min(means):
        return 0.0
    return max(means) / min(means) - 1 if min(means) > 0 else math.inf


def _plot(axis: Axes, costs: Costs, front: list[int], metric: Metric, unit: str) -> None:
    for rank, (cost, quality) in reversed([*costs.items()]):
        ranked = rank < len(COLOURS)
        axis.errorbar(
            cost.mean,
            quality.mean,
            xerr=cost.std if ranked else None,
            yerr=quality.std if ranked else None,
            color=colour(rank),
            marker=marker(rank),
            markersize=6.5 if ranked else 5,
            elinewidth=0.8,
            linestyle="none",
            zorder=3 if ranked else 2,
        )
    pairs = sorted((costs[rank][0].mean, costs[rank][1].mean) for rank in front)
    xs, ys = zip(*pairs, strict=True)
    axis.step(xs, ys, where="pre" if metric.better == "more" else "post", color="#555555", ls="--", lw=1, zorder=1)
    means = [cost.mean for cost, _ in costs.values()]
    label = f"{metric.title} ({unit}), {metric.better} is better"
    if _range(costs) < _SLIGHT:  # an axis of its own would exaggerate the difference
        axis.set_xlim(0, 1.3 * max(means))
        label += f"\nall within {_range(costs):.1%} of the smallest"
    elif min(means) > 0 and max(means) / min(means) > 20:
        axis.set_xscale("log")
    else:
        axis.margins(x=0.1)
        axis.locator_params(axis="x", nbins=6)  # the numbers are long
    axis.margins(y=0.1)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axis.set(xlabel=label)


def _costs(comparison: Comparison, metric: Metric) -> tuple[Scale, Costs]:
    """Of the configurations that have both a cost and a quality."""
    spreads = {rank: (one.spread(metric), quality) for rank, (one, quality) in enumerate(comparison.ranked())}
    found = {rank: (cost, quality) for rank, (cost, quality) in spreads.items() if cost is not None}
    scaled = scale([cost.mean for cost, _ in found.values()], metric.unit)

    def divided(cost: Spread) -> Spread:
        return Spread(cost.mean / scaled.size, None if cost.std is None else cost.std / scaled.size, cost.n)

    return scaled, {rank: (divided(cost), quality) for rank, (cost, quality) in found.items()}


def _front(costs: Costs, cost_metric: Metric, quality_metric: Metric) -> list[int]:
    """Ranks of the configurations on the front."""
    x, y = (-1.0 if one.better == "more" else 1.0 for one in (cost_metric, quality_metric))
    ranks = list(costs)
    return [ranks[i] for i in pareto_front([(x * cost.mean, y * quality.mean) for cost, quality in costs.values()])]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (x, y) that no other dominates, by ascending x. Less is better in both.

    A point dominates another if it is no worse in both coordinates and better in one; equal points are all kept.
    """

    def dominated(point: tuple[float, float]) -> bool:
        return any(x <= point[0] and y <= point[1] and (x, y) != point for x, y in points)

    return sorted((i for i, point in enumerate(points) if not dominated(point)), key=lambda i: points[i])


def place_labels(
    axis: Axes, crosses: Sequence[tuple[float, float, float, float]], names: Sequence[tuple[int, str]]
) -> None:
    """Writes each name beside the cross of its index, in order of preference, if there is room for it.

    crosses: (x, y, half width, half height) of points with error bars. The figure must have its layout.
    """
    frame, taken = axis.get_window_extent(), list[Bbox]()
    for x, y, width, height in crosses:
        corners = [(x, y), (x - width, y - height), (x + width, y + height)]
        (across, along), (left, bottom), (right, top) = axis.transData.transform(corners)
        taken.append(Bbox.from_extents(across, along, across, along).padded(_MARKER_ROOM))
        taken.append(Bbox.from_extents(left, along - 1, right, along + 1))
        taken.append(Bbox.from_extents(across - 1, bottom, across + 1, top))
    for index, name in names:
        for away, (x, y, side, level) in itertools.product(_DISTANCES, _DIRECTIONS):
            text = axis.annotate(
                name,
                crosses[index][:2],
                (x * away, y * away),
                textcoords="offset points",
                ha=side,
                va=level,
                fontsize=8.5,
                annotation_clip=False,
            )
            text.set_in_layout(False)
            box = text.get_window_extent()
            if frame.count_contains(box.corners()) == 4 and not box.count_overlaps(taken):
                taken.append(box)
                break
            text.remove()
