"""What all plots have in common. A point has one colour and one marker in all of them, by its rank; from the eighth on
points are grey."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybridlm.report.comparison import Comparison
from hybridlm.report.measures import Measure
from hybridlm.report.plots.colours import COLOURS, MARKERS
from hybridlm.report.table import Scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY = "#8a8a8a"
_LETTERS_PER_INCH = 11  # of a legend
_WIDTHS = {1: 7.0, 2: 11.0}  # inches, by columns
_NARROW = 5.0  # 480 pixels
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


@dataclass(frozen=True)
class Drawing:
    """A picture as SVG: ``wide`` with two panels beside each other, ``narrow`` with all of them below each other, for a
    narrow window.

    note: what has to be said of this picture.
    """

    wide: str
    narrow: str
    note: str = ""


def draw(panels: int, paint: Callable[[Figure, list[Axes]], None], note: str = "") -> Drawing:
    """paint: fills a figure with so many axes; it is called for each layout."""
    columns = min(panels, 2)
    return Drawing(_painted(panels, columns, paint), _painted(panels, 1, paint, _NARROW), note)


def _painted(panels: int, columns: int, paint: Callable[[Figure, list[Axes]], None], width: float | None = None) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    rows = -(-panels // columns)
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(width or _WIDTHS[columns], 3.6 * rows + 0.6), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axis in axes[panels:]:
            axis.remove()
        paint(figure, axes[:panels])
        return to_svg(figure)


def to_svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def line(
    axis: Axes, index: int, places: Sequence[float], means: Sequence[float], deviations: Sequence[float | None]
) -> None:
    ranked = index < len(COLOURS)
    axis.plot(
        places,
        means,
        color=colour(index),
        marker=marker(index) if ranked and len(places) <= 30 else None,
        markersize=4,
        linewidth=1.6 if ranked else 0.7,
        zorder=3 if ranked else 1,
    )
    if ranked and any(deviations):
        low = [mean - (deviation or 0.0) for mean, deviation in zip(means, deviations, strict=True)]
        high = [mean + (deviation or 0.0) for mean, deviation in zip(means, deviations, strict=True)]
        axis.fill_between(places, low, high, color=colour(index), alpha=0.15, linewidth=0)


def legend(figure: Figure, labels: Sequence[str]) -> None:
    """Under the axes: what each colour and marker means, and how many are grey."""
    from matplotlib.lines import Line2D

    room = int(figure.get_figwidth() * _LETTERS_PER_INCH)
    handles = [
        Line2D([], [], color=own, marker=mark, linewidth=1.6, label=_cut(label, min(60, room - 6)))
        for own, mark, label in zip(COLOURS, MARKERS, labels, strict=False)
    ]
    if len(labels) > len(COLOURS):
        handles.append(
            Line2D([], [], color=GREY, marker=".", linewidth=0.7, label=f"{len(labels) - len(COLOURS)} others")
        )
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = room // (longest + 8)
    figure.legend(
        handles=handles, loc="outside lower left", ncols=max(1, min(4, columns)), frameon=False, handlelength=1.8
    )


def point_legend(figure: Figure, comparison: Comparison) -> None:
    """The points with their numbers in the table."""
    legend(figure, [f"{i} {point.name}" for i, point in enumerate(comparison.points, 1)])


def quality_label(quality: Measure) -> str:
    return f"{quality.title}, {quality.better} is better"


def metric_label(metric: str, quality: Measure) -> str:
    if metric == quality.key:
        return f"{quality.title}, validation"
    return (
        "bits per byte, training (running mean)"
        if metric == "train/bpb"
        else "loss, training (nats/target, running mean)"
    )


def tokens_label(tokens: Scale) -> str:
    return f"tokens trained on ({tokens.unit})" if tokens.unit else "tokens trained on"


def within_shares(axis: Axes, quality: Measure) -> None:
    """Deviations of a share may reach beyond 1, which no share does."""
    if quality.unit == "share":
        axis.set_ylim(top=min(axis.get_ylim()[1], 1.02))


def colour(index: int) -> str:
    return COLOURS[index] if index < len(COLOURS) else GREY


def marker(index: int) -> str:
    return MARKERS[index] if index < len(MARKERS) else "."


def _cut(name: str, letters: int) -> str:
    return name if len(name) <= letters else name[: letters - 3] + "..."
