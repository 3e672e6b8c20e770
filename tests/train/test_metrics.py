"""metrics.jsonl and metrics.csv: each step once, also when metrics come in parts and after a resume."""

import csv
import json

from hybridlm.train.metrics import COLUMNS, RunFiles


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_of_one_step_share_a_line(tmp_path):
    files = RunFiles(tmp_path / "m.jsonl", tmp_path / "m.csv", resume_step=None)
    files.log_metrics({"train/loss": 3.0}, step=10)
    files.log_metrics({"val/bpb": 2.0}, step=10)
    files.log_metrics({"train/loss": 2.5}, step=20)
    assert rows(tmp_path / "m.jsonl") == [{"step": 10, "train/loss": 3.0, "val/bpb": 2.0}, {"step": 20, "train/loss": 2.5}]
    table = list(csv.DictReader((tmp_path / "m.csv").open()))
    assert [(row["step"], row["train/loss"], row["val/bpb"]) for row in table] == [("10", "3.0", "2.0"), ("20", "2.5", "")]
    assert tuple(table[0]) == COLUMNS


def test_a_resume_drops_the_steps_after_its_checkpoint_and_a_torn_last_line(tmp_path):
    path, table = tmp_path / "m.jsonl", tmp_path / "m.csv"
    first = RunFiles(path, table, resume_step=None)
    for step in (10, 20, 30):
        first.log_metrics({"train/loss": float(step)}, step=step)
    with path.open("a") as file:
        file.write('{"step": 40, "tra')
    second = RunFiles(path, table, resume_step=20)
    second.log_metrics({"train/loss": 31.0}, step=30)
    assert [(row["step"], row["train/loss"]) for row in rows(path)] == [(10, 10.0), (20, 20.0), (30, 31.0)]
    assert [row["step"] for row in csv.DictReader(table.open())] == ["10", "20", "30"]


def test_a_new_run_starts_empty(tmp_path):
    RunFiles(tmp_path / "m.jsonl", tmp_path / "m.csv", resume_step=None)
    assert (tmp_path / "m.jsonl").read_text() == ""
    assert (tmp_path / "m.csv").read_text() == ",".join(COLUMNS) + "\n"
