"""What all plots share. The colours stay distinct with colour blindness, the markers without any colour. A
configuration has the same colour and marker in all of them, by rank; from the eighth on they are grey."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot, which would open a window
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from hybridlm.report.metrics import Metric, Spread

# Okabe and Ito, "Color Universal Design" (jfly.uni-koeln.de/color; also Wong 2011, Nature Methods 8, 441), without the
# yellow, which is too light for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#8a8a8a"
TIME, TOKENS = "training time", "tokens trained on"
_CHARACTERS_PER_INCH = 11  # of a legend
_WIDTHS = {1: 7.0, 2: 11.0}  # inches, by columns
_NARROW = 5.0  # inches, 480 pixels
_SETTINGS: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "text.parse_math": False,  # a name may contain a dollar sign
    "svg.hashsalt": "hybridlm",
}


@dataclass(frozen=True)
class Drawing:
    """A figure as SVG: ``wide`` with two panels side by side, ``narrow`` with all panels stacked, for a narrow window.
    note: what to say about this figure."""

    wide: str
    narrow: str
    note: str = ""


def draw(panels: int, paint: Callable[[Figure, list[Axes]], None], note: str = "") -> Drawing:
    """paint: fills a figure with that many axes; called for each layout."""
    columns = min(panels, 2)
    return Drawing(_svg(panels, columns, paint, _WIDTHS[columns]), _svg(panels, 1, paint, _NARROW), note)


def _svg(panels: int, columns: int, paint: Callable[[Figure, list[Axes]], None], width: float) -> str:
    rows = -(-panels // columns)
    with matplotlib.rc_context(_SETTINGS):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
        figure = Figure(figsize=(width, 3.6 * rows + 0.6), layout=layout)
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axis in axes[panels:]:
            axis.remove()
        paint(figure, axes[:panels])
        return to_svg(figure)


def to_svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def lines(axis: Axes, curves: Sequence[Sequence[tuple[float, Spread]]]) -> None:
    """A line of means for each curve, the first on top, with a band of one standard deviation; grey lines have none."""
    for index, points in reversed([*enumerate(curves)]):
        ranked, xs = index < len(COLOURS), [x for x, _ in points]
        marks = marker(index) if ranked and len(xs) <= 30 else None
        style: dict[str, Any] = {"linewidth": 1.6 if ranked else 0.7, "zorder": 3 if ranked else 1}
        if points:
            axis.plot(xs, [one.mean for _, one in points], color=colour(index), marker=marks, markersize=4, **style)
        if ranked and any(one.std for _, one in points):
            low, high = ([one.mean + sign * (one.std or 0.0) for _, one in points] for sign in (-1, 1))
            axis.fill_between(xs, low, high, color=colour(index), alpha=0.15, linewidth=0)


def legend(figure: Figure, labels: Sequence[str]) -> None:
    """Below the axes: what each colour and marker stands for, and how many are grey."""
    room = int(figure.get_figwidth() * _CHARACTERS_PER_INCH)
    limit = min(60, room - 6)
    shown = [label if len(label) <= limit else f"{label[: limit - 3]}..." for label in labels[: len(COLOURS)]]
    handles = [
        Line2D([], [], color=colour(i), marker=marker(i), linewidth=1.6, label=label) for i, label in enumerate(shown)
    ]
    if len(labels) > len(COLOURS):
        shown.append(f"{len(labels) - len(COLOURS)} others")
        handles.append(Line2D([], [], color=GREY, marker=".", linewidth=0.7, label=shown[-1]))
    columns = max(1, min(4, room // (max(map(len, shown)) + 8)))
    figure.legend(handles=handles, loc="outside lower left", ncols=columns, frameon=False, handlelength=1.8)


def limit_shares(axis: Axes, quality: Metric) -> None:
    """Error bars of a share may exceed 1, which no share does."""
    if quality.unit == "share":
        axis.set_ylim(top=min(axis.get_ylim()[1], 1.02))


def colour(index: int) -> str:
    return COLOURS[index] if index < len(COLOURS) else GREY


def marker(index: int) -> str:
    return MARKERS[index] if index < len(MARKERS) else "."
