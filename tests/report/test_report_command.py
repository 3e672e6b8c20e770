"""``hybridlm report`` as a user meets it, also over real runs."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from run_folders import make_run
from typer.testing import CliRunner

from hybridlm.cli.compose import compose_config
from hybridlm.cli.verbs import app
from hybridlm.report.metrics import COSTS, QUALITIES
from hybridlm.report.runs import read_folders
from hybridlm.runs.run_folder import RunFolder

TRAIN = Path(__file__).resolve().parents[2] / "train.py"


def report(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_the_report_goes_into_the_first_folder(tmp_path):
    for name in "ab":
        make_run(tmp_path / name / "0", pattern=name.upper().replace("A", "T").replace("B", "M"))
    result = report(tmp_path / "b", tmp_path / "a")
    assert (result.exit_code, result.stderr) == (0, "")
    assert (
        result.stdout.splitlines()[-1] == f"{tmp_path}/b/report.html, report.md with its plots, and report.csv: 2 runs"
    )
    plots = ["report-1-costs.svg", "report-1-learning.svg"]
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [
        "0",
        *plots,
        "report.csv",
        "report.html",
        "report.md",
    ]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["0"]


def test_last_is_the_newest_run_unless_it_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("outputs/a", "multirun/x/b", "last")):
        os.utime(make_run(tmp_path / name, pattern=("T", "M", "TM")[i]) / "config.yaml", (i, i))
    result = report("last")
    assert (result.exit_code, result.stderr) == (0, "")
    assert (
        result.stdout.splitlines()[-1]
        == f"{tmp_path}/multirun/x/b/report.html, report.md with its plots, and report.csv: 1 run"
    )
    assert "hybridlm report last" in (tmp_path / "multirun/x/b/report.md").read_text()
    assert report("./last", "--out", "out").exit_code == 0
    assert "| pattern | TM |" in (tmp_path / "out/report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["last"], "error: last: no run under {here}/outputs or {here}/multirun; start one with python train.py"),
        (["empty"], "error: no run in empty: expected folders with config.yaml (python train.py) or job.json"),
        (["gone", "empty", "file"], "error: gone: no such folder\nerror: file: a file, not a folder"),
        (
            ["runs", "--out", "file"],
            "error: file: cannot write the report (File exists); choose a folder with --out",
        ),
        (
            ["runs", "--out", "file/x"],
            "error: file/x: cannot write the report (Not a directory); choose a folder with --out",
        ),
        (
            ["runs", "--best-of", "optim.lr", "--best-of", "lr"],
            "error: --best-of optim.lr: these runs do not differ in it; they differ in model.pattern",
        ),
    ],
)
def test_a_mistake_gives_one_line(tmp_path, monkeypatch, arguments, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for pattern in "TM":
        make_run(tmp_path / "runs" / pattern, pattern=pattern)
    result = report(*arguments)
    assert (result.exit_code, result.stderr) == (2, f"{line.format(here=tmp_path)}\n")
    assert not list(tmp_path.glob("**/report.*"))


def test_a_real_run_has_all_metrics(tiny, tmp_path, capsys):
    from hybridlm.train.run import run

    run(compose_config(tiny), RunFolder(tmp_path / "run"), None)
    (found,) = read_folders([tmp_path])[0]
    figures = {metric.key: metric.of(found) for metric in (*QUALITIES, *COSTS)}
    assert {key for key, figure in figures.items() if figure is None} <= {"val/accuracy", "memory_gb"}
    assert figures["device_hours"] == pytest.approx(figures["seconds"] / 3600)
    told = (
        next(line for line in capsys.readouterr().out.splitlines() if "hybridlm report" in line)
        .partition("#")[0]
        .split()
    )
    result = report(*told[2:])
    assert (result.exit_code, result.stderr) == (0, "")
    assert "caution: This run saw " in result.stdout
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"report.html", "report.md", "report-1-course.svg"}


@pytest.mark.slow
def test_a_sweep_with_jobs_that_fail(tiny, tmp_path, environment):
    """As Hydra's own launcher leaves it, without a record of its jobs."""
    lines = ["-m", "model.pattern=T,MT,Q", "seed=0,1", "hydra.sweep.dir=sweep"]
    sweep = subprocess.run(
        [sys.executable, TRAIN, *tiny, *lines], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert sweep.returncode == 2, sweep.stderr
    result = report(tmp_path / "sweep")
    assert result.exit_code == 0, result.stderr
    with open(tmp_path / "sweep/report.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    done, failed = rows[:4], rows[4:]
    assert sorted((row["model.pattern"], row["seed"]) for row in done) == [
        (pattern, seed) for pattern in ("MT", "T") for seed in "01"
    ]
    assert [(row["model.pattern"], row["seed"], row["status"]) for row in failed] == [
        ("Q", "0", "failed"),
        ("Q", "1", "failed"),
    ]
    assert all("'Q'" in row["error"] for row in failed)
    best = json.loads((tmp_path / "sweep" / rows[0]["run"] / "summary.json").read_text())
    assert float(rows[0]["val/bpb"]) == best["val/bpb"]
    again = rows[0]["command"].split()
    assert again[:2] == ["python", "train.py"]
    assert "seed=" + rows[0]["seed"] in again
