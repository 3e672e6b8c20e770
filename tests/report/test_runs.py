"""Run folders in every state that a killed process, a sweep, or a user leaves them in."""

from __future__ import annotations

import json
import math
import shutil

import pytest
from run_folders import make_job, make_run

from hybridlm.errors import UserError
from hybridlm.report.metrics import CACHE, COSTS, QUALITIES, SPEED
from hybridlm.report.runs import read_folders


def read(*folders):
    return read_folders(list(folders))[0]


def test_every_run_once_at_any_depth_in_natural_order(tmp_path):
    for number in (10, 9, 2):
        make_run(tmp_path / f"multirun/day/{number}", seed=number)
    (tmp_path / "multirun/day/2/checkpoints").mkdir()
    shutil.copy(tmp_path / "multirun/day/2/config.yaml", tmp_path / "multirun/day/2/checkpoints")
    (tmp_path / "multirun/day/config.yaml").write_text("greeting: hello\n")  # of something else
    runs = read(tmp_path, tmp_path / "multirun/day", tmp_path / "multirun/day/9")
    assert [run.name for run in runs] == ["2", "9", "10"]
    assert [run.seed for run in runs] == [2, 9, 10]
    assert all(run.finished and run.error is None for run in runs)


def test_a_run_folder_itself(tmp_path):
    (run,) = read(make_run(tmp_path / "a", pattern="MT"))
    assert (run.name, run.setting("model.pattern"), run.setting("size"), run.setting("nothing")) == (
        "a",
        "MT",
        "tiny",
        None,
    )
    assert run.overrides == ('model.pattern="MT"', "seed=0")
    assert "return x < 1" in run.texts["samples"]


def test_folders_without_runs(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no run in .*empty: expected folders with config.yaml"):
        read(tmp_path / "empty")
    with pytest.raises(UserError, match="gone: no such folder"):
        read(tmp_path / "gone", tmp_path / "empty")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: a file, not a folder"):
        read(tmp_path / "file")


def test_a_killed_run(tmp_path):
    folder = make_run(tmp_path / "a", bpb=None)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 48, "val/bp')
    (run,) = read(folder)
    assert (run.status, run.error) == ("unfinished", "no summary.json; the last metrics are from step 40")
    assert [row["step"] for row in run.rows] == [8, 16, 24, 32, 40]


def test_a_hydra_job_that_failed_before_its_run_began(tmp_path):
    hydra = make_run(tmp_path / "0", pattern="T") / ".hydra"
    (tmp_path / "1").mkdir()
    shutil.copytree(hydra, tmp_path / "1/.hydra")
    (tmp_path / "1/.hydra/config.yaml").write_text("model: {pattern: Q}\ndata: {source: stdlib}\n")
    (tmp_path / "1/train.log").write_text(
        "2026-11-25 21:34:03,086 ERROR hybridlm.cli.compose: config error: model.pattern = 'Q': no layer\n"
    )
    (tmp_path / "2/.hydra").mkdir(parents=True)  # of another program
    (tmp_path / "2/.hydra/config.yaml").write_text("db: {name: x}\n")
    runs = read(tmp_path)
    assert [(run.name, run.status, run.error) for run in runs] == [
        ("0", "finished", None),
        ("1", "failed", "config error: model.pattern = 'Q': no layer"),
    ]
    assert runs[1].setting("model.pattern") == "Q"


def test_figures_of_a_run(tmp_path):
    (run,) = read(
        make_run(
            tmp_path / "a", pattern="T", bpb=1.75, facts={"val/loss": math.nan, "devices": 4, "tokens_per_s": None}
        )
    )
    figures = {metric.key: metric.of(run) for metric in (*QUALITIES, *COSTS)}
    assert figures["val/bpb"] == 1.75
    assert math.isnan(figures["val/loss"])
    assert (figures["tokens_per_s"], SPEED.of(run)) == (None, None)
    assert figures["device_hours"] == pytest.approx(36 * 4 / 3600)
    # 4 layers, 2 heads of 32: keys and values of 64 tokens in fp32
    assert figures["cache_bytes"] == 4 * 2 * 2 * 32 * 64 * 4


def test_a_model_of_another_version_has_no_cache_size(tmp_path):
    folder = make_run(tmp_path / "a")
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("  d_model: 64\n", "  width_of_old: 64\n"))
    (run,) = read(folder)
    assert CACHE.of(run) is None
    assert run.setting("model.width_of_old") == "64"


def test_jobs_of_a_sweep(tmp_path):
    make_run(make_job(tmp_path / "0-T", 0, "finished", seconds=100.0, attempts=2))
    make_job(
        tmp_path / "1-M",
        1,
        "failed",
        error="config error:\n data.path: no file",
        overrides=["++model.pattern=M", "seed=3"],
        seed=3,
    )
    make_job(tmp_path / "2-X", 2, "waiting")
    make_job(tmp_path / "3-Y", 3, "running")
    make_job(tmp_path / "4-Z", 4, "finished")  # without a summary
    (tmp_path / "sweep.json").write_text(
        json.dumps({"overrides": [], "varied": ["model.pattern"], "jobs": [], "command": "hybridlm sweep x"})
    )
    runs, (sweep,) = read_folders([tmp_path])
    assert [run.status for run in runs] == ["finished", "failed", "waiting", "running", "unfinished"]
    assert [run.error for run in runs] == [
        None,
        "config error: data.path: no file",
        "",
        "",
        "no summary.json and no metrics",
    ]
    assert (runs[0].seconds, runs[1].seed, runs[1].setting("model.pattern")) == (100.0, 3, "M")
    assert (sweep.command, sweep.varied) == ("hybridlm sweep x", ("model.pattern",))
