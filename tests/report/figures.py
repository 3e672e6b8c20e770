"""The matplotlib figures behind the plots of a report."""

from __future__ import annotations

from hybridlm.report.plots import drawing


def figures_of(monkeypatch):
    """A list that takes each figure before it is SVG, whose letters are outlines: of each drawing the wide one, then
    the narrow one."""
    figures = []
    monkeypatch.setattr(drawing, "to_svg", lambda figure: figures.append(figure) or "svg")
    return figures
