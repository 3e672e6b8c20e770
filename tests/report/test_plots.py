"""Names beside points, and what is drawn."""

from __future__ import annotations

import random
from itertools import combinations

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from run_folders import make_run

from hybridlm.report import plots
from hybridlm.report.comparison import compare
from hybridlm.report.labels import place
from hybridlm.report.reading import read_folders


def axes_of(points):
    figure = Figure(figsize=(6, 4))
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.plot([x for x, _ in points], [y for _, y in points], ".")
    axis.margins(0.1)
    figure.draw_without_rendering()
    return axis


@pytest.mark.parametrize("seed", range(5))
def test_names_cover_neither_points_nor_each_other_nor_the_edge(seed):
    draw = random.Random(seed)
    points = [(draw.random(), draw.random()) for _ in range(40)]
    axis = axes_of(points)
    place(axis, [(x, y, 0.0, 0.0) for x, y in points], [(i, f"point {i}") for i in range(40)])
    boxes = [text.get_window_extent() for text in axis.texts]
    assert len(boxes) > 10
    assert not [pair for pair in combinations(boxes, 2) if pair[0].shrunk(0.99, 0.99).overlaps(pair[1].shrunk(0.99, 0.99))]
    middles = axis.transData.transform(points)
    assert not [1 for box in boxes for x, y in middles if box.contains(x, y)]
    frame = axis.get_window_extent()
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1 for box in boxes)


def test_where_there_is_room_every_point_has_its_name():
    points = [(float(i), float(i % 3)) for i in range(6)]
    axis = axes_of(points)
    place(axis, [(x, y, 0.0, 0.1) for x, y in points], [(i, f"p{i}") for i in range(6)])
    assert sorted(text.get_text() for text in axis.texts) == [f"p{i}" for i in range(6)]


def test_names_in_the_plots_and_a_curve_that_diverges(tmp_path, monkeypatch):
    """The figure itself, before it is SVG, whose letters are outlines."""
    figures = []
    monkeypatch.setattr(plots, "_svg", lambda figure: figures.append(figure) or "svg")
    for i, (pattern, bpb) in enumerate([("T", 2.0), ("M", 1.9), ("TM", 1e6)]):
        make_run(tmp_path / str(i), pattern=pattern, bpb=bpb, facts={"tokens_per_s": 1e4 * (i + 1), "memory_gb": 3.0 - i})
    (one,) = compare(read_folders([tmp_path])[0])
    assert (plots.tradeoffs(one), plots.learning(one)) == ("svg", "svg")
    costs, learning = figures
    assert [axis.get_xlabel() for axis in costs.axes] == [
        "training speed (tokens/s), more is better",
        "peak memory (GiB), less is better",
        "cache of one window (KiB), less is better",
    ]
    assert {text.get_text() for axis in costs.axes for text in axis.texts} == {"T", "M", "TM"}
    (legend,) = costs.legends
    assert [text.get_text() for text in legend.get_texts()] == ["1 M", "2 T", "3 TM"]
    assert all(axis.get_ylim()[1] < 5 for axis in learning.axes), "the curve of a million does not flatten the others"


def test_points_that_cost_the_same_are_not_drawn_against_it(tmp_path):
    for i, seed in enumerate((0, 1)):
        make_run(tmp_path / str(i), pattern="T", seed=seed, settings={"optim.lr": 0.01 * (1 + i)})
    (one,) = compare(read_folders([tmp_path])[0])
    assert len(one.points) == 2
    assert plots.tradeoffs(one) is None
