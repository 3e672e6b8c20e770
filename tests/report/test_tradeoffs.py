"""Quality against cost: the Pareto front against a comparison of all pairs, labels, axes."""

from __future__ import annotations

import random
from itertools import combinations

import pytest
from figures import figures_of
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from run_folders import make_run

from hybridlm.report.comparison import compare
from hybridlm.report.plots.curves import learning_curves
from hybridlm.report.plots.tradeoffs import pareto_front, place_labels, tradeoffs
from hybridlm.report.runs import read_folders


def by_pairs(points):
    def beaten(one):
        return any(other[0] <= one[0] and other[1] <= one[1] and other != one for other in points)

    return {i for i, point in enumerate(points) if not beaten(point)}


@pytest.mark.parametrize("seed", range(50))
def test_the_front_against_all_pairs(seed):
    draw = random.Random(seed)
    highest = draw.choice([3, 8, 1000])  # few values: many ties, in one respect and in both
    points = [(draw.randint(0, highest), draw.randint(0, highest)) for _ in range(draw.randint(1, 40))]
    found = pareto_front(points)
    assert set(found) == by_pairs(points)
    assert len(found) == len(set(found))
    assert [points[i][0] for i in found] == sorted(points[i][0] for i in found)


def test_an_empty_front():
    assert pareto_front([]) == []


def axes_of(points):
    figure = Figure(figsize=(6, 4))
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.plot([x for x, _ in points], [y for _, y in points], ".")
    axis.margins(0.1)
    figure.draw_without_rendering()
    return axis


@pytest.mark.parametrize("seed", range(5))
def test_labels_do_not_overlap_markers_each_other_or_the_edge(seed):
    draw = random.Random(seed)
    points = [(draw.random(), draw.random()) for _ in range(40)]
    axis = axes_of(points)
    place_labels(axis, [(x, y, 0.0, 0.0) for x, y in points], [(i, f"point {i}") for i in range(40)])
    boxes = [text.get_window_extent() for text in axis.texts]
    assert len(boxes) > 10
    assert not [
        pair for pair in combinations(boxes, 2) if pair[0].shrunk(0.99, 0.99).overlaps(pair[1].shrunk(0.99, 0.99))
    ]
    middles = axis.transData.transform(points)
    assert not [1 for box in boxes for x, y in middles if box.contains(x, y)]
    frame = axis.get_window_extent()
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1 for box in boxes)


def test_with_enough_room_every_point_is_labelled():
    points = [(float(i), float(i % 3)) for i in range(6)]
    axis = axes_of(points)
    place_labels(axis, [(x, y, 0.0, 0.1) for x, y in points], [(i, f"p{i}") for i in range(6)])
    assert sorted(text.get_text() for text in axis.texts) == [f"p{i}" for i in range(6)]


def test_labels_and_a_diverging_curve(tmp_path, monkeypatch):
    figures = figures_of(monkeypatch)
    for i, (pattern, bpb) in enumerate([("T", 2.0), ("M", 1.9), ("TM", 1e6)]):
        make_run(
            tmp_path / str(i), pattern=pattern, bpb=bpb, facts={"tokens_per_s": 1e4 * (i + 1), "memory_gb": 3.0 - i}
        )
    (one,) = compare(read_folders([tmp_path])[0])
    assert tradeoffs(one)
    assert learning_curves(one)
    costs, _, learning, _ = figures
    assert [axis.get_xlabel() for axis in costs.axes] == [
        "training speed (tokens/s), more is better",
        "peak memory (GiB), less is better",
        "decode cache of one window (KiB), less is better",
    ]
    assert {text.get_text() for axis in costs.axes for text in axis.texts} == {"T", "M", "TM"}
    (legend,) = costs.legends
    assert [text.get_text() for text in legend.get_texts()] == ["1 M", "2 T", "3 TM"]
    assert all(axis.get_ylim()[1] < 5 for axis in learning.axes), "the curve of a million does not flatten the others"


def test_equal_costs_are_not_plotted(tmp_path):
    for i, seed in enumerate((0, 1)):
        make_run(tmp_path / str(i), pattern="T", seed=seed, settings={"optim.lr": 0.01 * (1 + i)})
    (one,) = compare(read_folders([tmp_path])[0])
    assert len(one.configurations) == 2
    assert tradeoffs(one) is None
    make_run(
        tmp_path / "2", pattern="T", settings={"optim.lr": 0.04}, facts={"memory_gb": 0.504, "tokens_per_s": 10_050.0}
    )
    (one,) = compare(read_folders([tmp_path])[0])
    assert tradeoffs(one) is None, "less than one in a hundred is what scatters"


def test_slightly_different_costs_have_an_axis_from_zero(tmp_path, monkeypatch):
    figures = figures_of(monkeypatch)
    for i, pattern in enumerate(("T", "M", "TM")):
        facts = {"tokens_per_s": 10_000.0 + 150 * i, "memory_gb": 1.0 + 0.06 * i, "train_flops_per_token": 1e6 + i}
        make_run(tmp_path / str(i), pattern=pattern, bpb=2.0 + i / 10, facts=facts)
    (one,) = compare(read_folders([tmp_path])[0])
    drawn = tradeoffs(one)
    for figure in figures:
        speed, memory, cache = figure.axes
        assert speed.get_xlim()[0] == 0
        assert speed.get_xlim()[1] > 10_300
        assert speed.get_xlabel() == "training speed (tokens/s), more is better\nall within 3.0% of the smallest"
        assert memory.get_xlim()[0] > 0.9, "12% are a difference"
        assert cache.get_xlim()[0] > 0
    assert "1%" in drawn.note
    assert "training FLOPs per token" in drawn.note
