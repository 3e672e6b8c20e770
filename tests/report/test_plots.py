"""Names beside points, and what is drawn."""

from __future__ import annotations

import random
from itertools import combinations

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from run_folders import make_run

from hybridlm.report.comparison import compare
from hybridlm.report.plots import drawing, lines, tradeoffs
from hybridlm.report.plots.labels import place
from hybridlm.report.reading import read_folders


def axes_of(points):
    figure = Figure(figsize=(6, 4))
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.plot([x for x, _ in points], [y for _, y in points], ".")
    axis.margins(0.1)
    figure.draw_without_rendering()
    return axis


def figures_of(monkeypatch):
    """A list that takes each figure before it is SVG, whose letters are outlines: of each drawing the wide one, then
    the narrow one."""
    figures = []
    monkeypatch.setattr(drawing, "to_svg", lambda figure: figures.append(figure) or "svg")
    return figures


@pytest.mark.parametrize("seed", range(5))
def test_names_cover_neither_points_nor_each_other_nor_the_edge(seed):
    draw = random.Random(seed)
    points = [(draw.random(), draw.random()) for _ in range(40)]
    axis = axes_of(points)
    place(axis, [(x, y, 0.0, 0.0) for x, y in points], [(i, f"point {i}") for i in range(40)])
    boxes = [text.get_window_extent() for text in axis.texts]
    assert len(boxes) > 10
    assert not [
        pair for pair in combinations(boxes, 2) if pair[0].shrunk(0.99, 0.99).overlaps(pair[1].shrunk(0.99, 0.99))
    ]
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
    figures = figures_of(monkeypatch)
    for i, (pattern, bpb) in enumerate([("T", 2.0), ("M", 1.9), ("TM", 1e6)]):
        make_run(
            tmp_path / str(i), pattern=pattern, bpb=bpb, facts={"tokens_per_s": 1e4 * (i + 1), "memory_gb": 3.0 - i}
        )
    (one,) = compare(read_folders([tmp_path])[0])
    assert tradeoffs.tradeoffs(one)
    assert lines.learning(one)
    costs, _, learning, _ = figures
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
    assert tradeoffs.tradeoffs(one) is None
    make_run(
        tmp_path / "2", pattern="T", settings={"optim.lr": 0.04}, facts={"memory_gb": 0.504, "tokens_per_s": 10_050.0}
    )
    (one,) = compare(read_folders([tmp_path])[0])
    assert tradeoffs.tradeoffs(one) is None, "less than one in a hundred is what scatters"


def test_costs_that_differ_by_little_have_an_axis_from_zero(tmp_path, monkeypatch):
    figures = figures_of(monkeypatch)
    for i, pattern in enumerate(("T", "M", "TM")):
        facts = {"tokens_per_s": 10_000.0 + 150 * i, "memory_gb": 1.0 + 0.06 * i, "train_flops_per_token": 1e6 + i}
        make_run(tmp_path / str(i), pattern=pattern, bpb=2.0 + i / 10, facts=facts)
    (one,) = compare(read_folders([tmp_path])[0])
    drawn = tradeoffs.tradeoffs(one)
    for figure in figures:
        speed, memory, cache = figure.axes
        assert speed.get_xlim()[0] == 0
        assert speed.get_xlim()[1] > 10_300
        assert speed.get_xlabel() == "training speed (tokens/s), more is better\nall within 3.0% of the least"
        assert memory.get_xlim()[0] > 0.9, "12% are a difference"
        assert cache.get_xlim()[0] > 0
    assert drawn.note == "Within 1% of each other, and not drawn: training FLOPs per token."


def test_quality_by_a_setting_has_a_line_for_each_of_the_other_settings(tmp_path, monkeypatch):
    figures = figures_of(monkeypatch)
    for i, (pattern, size, bpb) in enumerate(
        [("M2", 4, 3.0), ("M2", 16, 2.0), ("M2", 64, 1.5), ("M3", 64, 1.0), ("M3", 4, 2.5), ("T", 16, 1.2)]
    ):
        overrides = [f"model.pattern={pattern}", f"model.mamba2.d_state={size}"]
        make_run(
            tmp_path / str(i), pattern=pattern, bpb=bpb, settings={"model.mamba2.d_state": size}, overrides=overrides
        )
    (one,) = compare(read_folders([tmp_path])[0])
    (column,) = lines.numeric_settings(one)
    assert column == "model.mamba2.d_state"
    lines.by_setting(one, column)
    (axis,) = figures[0].axes
    drawn = {tuple(line.get_xdata()): tuple(line.get_ydata()) for line in axis.get_lines()}
    assert drawn == {(4.0, 64.0): (2.5, 1.0), (16.0,): (1.2,), (4.0, 16.0, 64.0): (3.0, 2.0, 1.5)}
    assert (axis.get_xlabel(), axis.get_xscale(), list(axis.get_xticks())) == (
        "model.mamba2.d_state",
        "log",
        [4, 16, 64],
    )
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["M3", "T", "M2"], (
        "the one with the best point first"
    )


@pytest.mark.parametrize("sigmas", [(6.0, 7.0), (6.0, 7.0, None)])
def test_a_setting_without_three_numbers_has_no_plot_of_its_own(tmp_path, sigmas):
    for i, sigma in enumerate(sigmas):
        make_run(tmp_path / str(i), settings={"trainer.guard.spike_sigma": sigma})
    (one,) = compare(read_folders([tmp_path])[0])
    assert lines.numeric_settings(one) == []
