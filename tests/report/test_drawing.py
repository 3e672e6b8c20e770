"""Layouts, colours and legends that all plots share."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from figures import figures_of

from hybridlm.report.plots.drawing import COLOURS, GREY, colour, draw, legend, marker


def size(svg):
    root = ElementTree.fromstring(svg)
    return tuple(float(root.attrib[side].removesuffix("pt")) for side in ("width", "height"))


@pytest.mark.parametrize("panels", [1, 2, 3])
def test_panels_are_side_by_side_in_a_wide_window_and_stacked_in_a_narrow_one(panels):
    painted = []
    drawing = draw(panels, lambda figure, axes: painted.append(len(axes)))
    wide, narrow = size(drawing.wide), size(drawing.narrow)
    assert painted == [panels, panels]
    assert narrow[0] == 360, "480 pixels"
    assert (wide[0] > 600) == (panels > 1)
    assert (narrow[1] > 1.4 * wide[1]) == (panels > 1)


def test_seven_configurations_have_colours_and_the_others_share_a_legend_entry(monkeypatch):
    figures = figures_of(monkeypatch)
    names = ["x" * 200, *map(str, range(2, 10))]
    draw(1, lambda figure, axes: legend(figure, names))
    for figure in figures:
        texts = [text.get_text() for text in figure.legends[0].get_texts()]
        assert texts[1:] == ["2", "3", "4", "5", "6", "7", "2 others"]
        assert len(texts[0]) <= 60
        assert texts[0].endswith("x...")
    assert len({(colour(i), marker(i)) for i in range(7)}) == len(COLOURS) == 7
    assert [colour(7), colour(8)] == [GREY, GREY]
