"""The course of one run."""

from __future__ import annotations

import pytest
from figures import figures_of
from run_folders import make_run, rewrite

from hybridlm.report.metrics import QUALITIES
from hybridlm.report.plots.course import course
from hybridlm.report.runs import read_folders


def panels(tmp_path, monkeypatch, change, quality=0):
    figures = figures_of(monkeypatch)
    folder = make_run(tmp_path / "a")
    rewrite(folder, change)
    assert course(read_folders([folder])[0][0], QUALITIES[quality])
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
    assert labels["gradient norm before clipping"] == ["as logged", "skipped steps (2)"]
    assert axes["training speed (tokens/s)"].get_ylim()[0] == 0
    assert axes["training speed (tokens/s)"].get_xlabel() == "training time (s)"
    norm = axes["gradient norm before clipping"]
    assert norm.get_yscale() == "log"
    assert [line.get_xdata()[0] for line in norm.get_lines()[1:]] == pytest.approx([32 * 0.512, 40 * 0.512]), (
        "thousand tokens"
    )
    assert all("$" not in text.get_text() for axis in axes.values() for text in axis.get_yticklabels())


def test_the_course_of_a_task_shows_accuracy(tmp_path, monkeypatch):
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
    assert course(read_folders([folder])[0][0], QUALITIES[0]) is None
