"""Which metric is drawn, and smoothed how; the course of one run."""

from __future__ import annotations

import json
import random

import pytest
from run_folders import make_run
from test_plots import figures_of

from hybridlm.report.comparison import compare
from hybridlm.report.measures import QUALITIES
from hybridlm.report.plots import lines
from hybridlm.report.plots.course import course
from hybridlm.report.plots.curves import Place, curve, metric_drawn, smoothed
from hybridlm.report.reading import read_folders


def rewrite(folder, change):
    """change: of a row of the metrics, and its place."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(change(row, i)) + "\n" for i, row in enumerate(rows)))


def without(*keys, but=()):
    return lambda row, i: {key: value for key, value in row.items() if key not in keys or i in but}


def read(folder):
    return read_folders([folder])[0]


def test_validations_are_drawn_where_every_run_has_two(tmp_path):
    folders = [make_run(tmp_path / str(i), pattern="TM"[i]) for i in range(2)]
    points = [[run] for run in read(tmp_path)]
    assert metric_drawn(points, "val/bpb") == "val/bpb"
    assert metric_drawn(points, "val/accuracy") == "train/loss"
    rewrite(folders[1], without("val/bpb", but={1, 4}))
    assert metric_drawn([[run] for run in read(tmp_path)], "val/bpb") == "val/bpb"
    rewrite(folders[1], without("val/bpb", but={4}))
    points = [[run] for run in read(tmp_path)]
    assert metric_drawn(points, "val/bpb") == "train/bpb", (
        "a curve of one point is none, and the two would be of different things"
    )
    (folders[1] / "metrics.jsonl").unlink()
    assert metric_drawn([[run] for run in read(tmp_path)], "val/bpb") == "val/bpb", "the other was validated twice"


def test_the_plot_says_what_it_is_of(tmp_path, monkeypatch):
    figures = figures_of(monkeypatch)
    folders = [make_run(tmp_path / str(i), pattern="TM"[i], bpb=2.0 + i) for i in range(2)]
    (one,) = compare(read(tmp_path))
    assert lines.learning(one).note == "Of validations."
    for folder in folders:
        rewrite(folder, without("val/bpb", but={4}))
    (one,) = compare(read(tmp_path))
    note = lines.learning(one).note
    assert note.startswith(
        "Of training, as not every run was validated twice on its way; each value is a running mean over a tenth of"
    )
    (folders[1] / "metrics.jsonl").unlink()
    (one,) = compare(read(tmp_path))
    assert lines.learning(one).note.endswith("Measured less than twice, and not drawn: M.")
    assert [figure.axes[0].get_ylabel() for figure in figures[::2]] == [
        "bits per byte, validation",
        *["bits per byte, training (running mean)"] * 2,
    ]


@pytest.mark.parametrize(("n", "half"), [(1, 1), (6, 1), (39, 1), (40, 2), (200, 10)])
def test_a_running_mean_over_a_tenth(n, half):
    draw = random.Random(n)
    values = [draw.random() for _ in range(n)]
    found = [place.value for place in smoothed([Place(i, i * 512.0, i * 0.1, value) for i, value in enumerate(values)])]
    assert len(found) == n
    for i in range(n):
        around = [values[j] for j in range(n) if abs(i - j) <= half]
        assert found[i] == pytest.approx(sum(around) / len(around))


def test_training_is_smoothed_and_validation_is_not(tmp_path):
    (run,) = read(make_run(tmp_path / "a"))
    trained = [row["train/bpb"] for row in run.rows]
    assert curve([run], "train/bpb")[2].value.mean == pytest.approx(sum(trained[1:4]) / 3)
    assert [mark.value.mean for mark in curve([run], "val/bpb")] == [row["val/bpb"] for row in run.rows]


def panels(tmp_path, monkeypatch, change, quality=0):
    figures = figures_of(monkeypatch)
    folder = make_run(tmp_path / "a")
    rewrite(folder, change)
    assert course(read(folder)[0], QUALITIES[quality])
    return {axis.get_ylabel(): axis for axis in figures[0].axes}


def optim(row, i):
    more = {
        "optim/lr": 0.02,
        "optim/lr/embedding": 0.02,
        "optim/lr/vector": 0.02,
        "optim/lr/matrix": 0.01,
        "perf/tokens_per_s": 1e4,
    }
    return {**row, **more, "optim/grad_norm": 500.0 if i == 3 else 1.0, "optim/skipped_steps": max(0, i - 2)}


def test_the_course_of_a_run(tmp_path, monkeypatch):
    axes = panels(tmp_path, monkeypatch, optim)
    assert list(axes) == [
        "bits per byte",
        "training speed (tokens/s)",
        "learning rate",
        "gradient norm before clipping",
    ]
    labels = {name: [text.get_text() for text in axis.get_legend().get_texts()] for name, axis in axes.items()}
    assert labels["bits per byte"] == ["training", "smoothed", "validation"]
    assert labels["learning rate"] == ["embedding, vector", "matrix"], "parameters of one rate share a line"
    assert labels["gradient norm before clipping"] == ["as logged", "steps were skipped (2)"]
    assert axes["training speed (tokens/s)"].get_ylim()[0] == 0
    assert axes["training speed (tokens/s)"].get_xlabel() == "time of training (s)"
    norm = axes["gradient norm before clipping"]
    assert norm.get_yscale() == "log"
    assert [line.get_xdata()[0] for line in norm.get_lines()[1:]] == pytest.approx([32 * 0.512, 40 * 0.512]), (
        "thousand tokens"
    )
    assert all("$" not in text.get_text() for axis in axes.values() for text in axis.get_yticklabels())


def test_the_course_of_a_task_has_its_right_answers(tmp_path, monkeypatch):
    def change(row, i):
        return {
            "step": row["step"],
            "data/tokens": row["data/tokens"],
            "train/loss": 3.0,
            "val/loss": 2.5,
            "val/accuracy": 0.1 * i,
        }

    axes = panels(tmp_path, monkeypatch, change, quality=1)
    assert list(axes) == ["loss (nats/target)", "accuracy, more is better"], "what was not measured has no panel"
    assert axes["accuracy, more is better"].get_ylim() == (0, 1.02)


def test_a_run_that_logged_one_step_has_no_course(tmp_path):
    folder = make_run(tmp_path / "a")
    (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert course(read(folder)[0], QUALITIES[0]) is None
