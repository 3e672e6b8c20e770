"""Which metric is plotted, how it is smoothed, and quality by a setting."""

from __future__ import annotations

import json
import math
import random

import pytest
from figures import figures_of
from run_folders import make_run, rewrite, without

from hybridlm.report.comparison import compare
from hybridlm.report.plots import curves
from hybridlm.report.plots.curves import Sample, curve, plotted_metric, smoothed
from hybridlm.report.runs import read_folders


def read(folder):
    return read_folders([folder])[0]


def test_validations_are_plotted_if_every_run_has_two(tmp_path):
    folders = [make_run(tmp_path / str(i), pattern="TM"[i]) for i in range(2)]
    points = [[run] for run in read(tmp_path)]
    assert plotted_metric(points, "val/bpb") == "val/bpb"
    assert plotted_metric(points, "val/accuracy") == "train/loss"
    rewrite(folders[1], without("val/bpb", but={1, 4}))
    assert plotted_metric([[run] for run in read(tmp_path)], "val/bpb") == "val/bpb"
    rewrite(folders[1], without("val/bpb", but={4}))
    points = [[run] for run in read(tmp_path)]
    assert plotted_metric(points, "val/bpb") == "train/bpb", (
        "a curve of one point is none, and the two would be of different things"
    )
    (folders[1] / "metrics.jsonl").unlink()
    assert plotted_metric([[run] for run in read(tmp_path)], "val/bpb") == "val/bpb", "the other was validated twice"


def test_the_plot_states_its_metric_and_what_is_not_drawn(tmp_path, monkeypatch):
    figures = figures_of(monkeypatch)
    folders = [make_run(tmp_path / str(i), pattern="TM"[i], bpb=2.0 + i) for i in range(2)]

    def drawn():
        (one,) = compare(read(tmp_path))
        note = curves.learning_curves(one).note
        return figures[-2].axes[0].get_ylabel(), note

    assert drawn() == ("bits per byte, validation", "Validation.")
    for folder in folders:
        rewrite(folder, without("val/bpb", but={4}))
    label, note = drawn()
    assert label == "bits per byte, training (running mean)"
    assert curves.SMOOTHING in note
    (folders[1] / "metrics.jsonl").unlink()
    assert drawn()[1].endswith(": M.")


@pytest.mark.parametrize(("n", "half"), [(1, 1), (6, 1), (39, 1), (40, 2), (200, 10)])
def test_a_running_mean_over_a_tenth(n, half):
    draw = random.Random(n)
    values = [draw.random() for _ in range(n)]
    samples = [Sample(i, i * 512.0, i * 0.1, value) for i, value in enumerate(values)]
    found = [sample.value for sample in smoothed(samples)]
    assert len(found) == n
    for i in range(n):
        around = [values[j] for j in range(n) if abs(i - j) <= half]
        assert found[i] == pytest.approx(sum(around) / len(around))


def test_training_is_smoothed_and_validation_is_not(tmp_path):
    (run,) = read(make_run(tmp_path / "a"))
    trained = [row["train/bpb"] for row in run.rows]
    assert curve([run], "train/bpb")[2].value.mean == pytest.approx(sum(trained[1:4]) / 3)
    assert [mark.value.mean for mark in curve([run], "val/bpb")] == [row["val/bpb"] for row in run.rows]


def test_curves_are_means_over_the_steps_that_all_seeds_logged(tmp_path):
    folders = [make_run(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    rows = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in folders]
    rows[1][2]["val/bpb"] = math.nan
    (folders[1] / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1][:4]))
    marks = curve(read(tmp_path), "val/bpb")
    assert [mark.tokens for mark in marks] == [step * 512 for step in (8, 16, 24, 32)]
    # steps of 0.11 s with their data, and 0.5 s for each validation so far
    assert [mark.seconds for mark in marks] == pytest.approx(
        [step * 0.11 + 0.5 * i for i, step in enumerate((8, 16, 24, 32), 1)]
    )
    assert marks[0].value.mean == pytest.approx((rows[0][0]["val/bpb"] + rows[1][0]["val/bpb"]) / 2)
    assert [mark.value.n for mark in marks] == [2, 2, 1, 2]


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
    ((column, _),) = curves.settings_curves(one)
    assert column == "model.mamba2.d_state"
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
def test_a_setting_without_three_numbers_is_not_plotted(tmp_path, sigmas):
    for i, sigma in enumerate(sigmas):
        make_run(tmp_path / str(i), settings={"trainer.guard.spike_sigma": sigma})
    (one,) = compare(read_folders([tmp_path])[0])
    assert list(curves.settings_curves(one)) == []
