"""Names beside the points of a plot, where they cover neither a point nor each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ROOM = 4.0  # pixels that a point takes on each side of its middle
_DISTANCES = (7.0, 13.0, 20.0)  # of a name from its point, in typographic points

Box = tuple[float, float, float, float]  # left, bottom, right, top


def place(axis: Axes, points: Sequence[tuple[float, float]], names: Sequence[tuple[int, str]]) -> None:
    """Writes each name (of the point with this index) beside its point, the first name first; one without room is left out.

    The figure has its layout.
    """
    frame = axis.get_window_extent()
    middles = [tuple(axis.transData.transform(point)) for point in points]
    taken: list[Box] = [(x - _ROOM, y - _ROOM, x + _ROOM, y + _ROOM) for x, y in middles]
    for index, name in names:
        for dx, dy, across, along in _offsets():
            text = axis.annotate(
                name, points[index], (dx, dy), textcoords="offset points", ha=across, va=along, fontsize=8.5, annotation_clip=False
            )
            text.set_in_layout(False)
            box = text.get_window_extent()
            edges: Box = (box.x0, box.y0, box.x1, box.y1)
            inside = box.x0 >= frame.x0 and box.x1 <= frame.x1 + 20 and box.y0 >= frame.y0 and box.y1 <= frame.y1
            if inside and not any(_overlap(edges, other) for other in taken):
                taken.append(edges)
                break
            text.remove()


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _offsets() -> Iterator[tuple[float, float, str, str]]:
    """(right, up, horizontal alignment, vertical alignment), the preferred place first."""
    for away in _DISTANCES:
        side = away * 0.6
        yield away, 0.0, "left", "center"
        yield -away, 0.0, "right", "center"
        yield 0.0, away, "center", "bottom"
        yield 0.0, -away, "center", "top"
        yield side, side, "left", "bottom"
        yield side, -side, "left", "top"
        yield -side, side, "right", "bottom"
        yield -side, -side, "right", "top"
