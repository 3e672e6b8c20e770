"""Names beside the points of a plot, where they cover neither a point nor each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation

_ROOM = 4.0  # pixels that a point takes on each side of its middle
_DISTANCES = (7.0, 13.0, 20.0)  # of a name from its point, in typographic points

Box = tuple[float, float, float, float]  # left, bottom, right, top


def place(axis: Axes, crosses: Sequence[tuple[float, float, float, float]], names: Sequence[tuple[int, str]]) -> None:
    """Writes each name beside the cross of its index, the first name first: clear of everything, else across the arms
    of crosses; one without room is left out.

    crosses: (x, y, half the width, half the height) of points with error bars. The figure has its layout.
    """
    frame = axis.get_window_extent()
    taken, arms = list[Box](), list[Box]()
    for x, y, width, height in crosses:
        (left, bottom), (right, top) = axis.transData.transform([(x - width, y - height), (x + width, y + height)])
        across, along = axis.transData.transform((x, y))
        taken.append((across - _ROOM, along - _ROOM, across + _ROOM, along + _ROOM))
        arms += [(left, along - 1, right, along + 1), (across - 1, bottom, across + 1, top)]
    for index, name in names:
        room: Annotation | None = None
        for dx, dy, side, level in _offsets():
            text = axis.annotate(
                name,
                crosses[index][:2],
                (dx, dy),
                textcoords="offset points",
                ha=side,
                va=level,
                fontsize=8.5,
                annotation_clip=False,
            )
            text.set_in_layout(False)
            edges = _edges(text)
            inside = edges[0] >= frame.x0 and edges[2] <= frame.x1 and edges[1] >= frame.y0 and edges[3] <= frame.y1
            free = inside and not any(_overlap(edges, other) for other in taken)
            clear = free and not any(_overlap(edges, other) for other in arms)
            if free and (clear or room is None):
                if room is not None:
                    room.remove()
                room = text
            else:
                text.remove()
            if clear:
                break
        if room is not None:
            taken.append(_edges(room))


def _edges(text: Annotation) -> Box:
    box = text.get_window_extent()
    return box.x0, box.y0, box.x1, box.y1


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _offsets() -> Iterator[tuple[float, float, str, str]]:
    """(right, up, horizontal alignment, vertical alignment), the preferred place first."""
    for away in _DISTANCES:
        side = away * 0.6
        yield side, side, "left", "bottom"
        yield side, -side, "left", "top"
        yield -side, side, "right", "bottom"
        yield -side, -side, "right", "top"
        yield away, 0.0, "left", "center"
        yield -away, 0.0, "right", "center"
        yield 0.0, away, "center", "bottom"
        yield 0.0, -away, "center", "top"
