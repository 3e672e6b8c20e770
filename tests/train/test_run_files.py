"""What a run writes beside its checkpoints, on a disk that is full for a while and in a folder that goes away."""

from __future__ import annotations

import csv
import errno
import io
import json
import shutil

import pytest

from hybridlm.cli.compose import compose_config
from hybridlm.errors import RunFailed
from hybridlm.runs.run_folder import RunFolder
from hybridlm.train import run_files
from hybridlm.train.run import run
from hybridlm.train.run_files import LineFile, RunFiles, write_or_warn


class Full(io.FileIO):
    """A file on a disk that takes ten bytes more."""

    def write(self, data):
        super().write(data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def disk(monkeypatch):
    """``disk(full=...)`` fills the disk of the files of rows, or makes room."""

    def fill(*, full: bool) -> None:
        if full:
            monkeypatch.setattr(run_files, "open", lambda path, mode: Full(path, mode), raising=False)
        else:
            monkeypatch.delattr(run_files, "open")

    return fill


def test_rows_that_a_full_disk_refused_are_written_once_there_is_room(tmp_path, disk):
    jsonl, table, said = tmp_path / "m.jsonl", tmp_path / "m.csv", []
    files = RunFiles(jsonl, table, resume_step=None, say=said.append)
    files.log_metrics({"train/loss": 1.0}, step=1)
    disk(full=True)
    files.log_metrics({"val/loss": 9.0}, step=1)  # more of a row that is on the disk
    for step in (2, 3):
        files.log_metrics({"train/loss": float(step)}, step=step)
    files.log_metrics({"val/loss": 4.0}, step=3)
    assert [line.startswith("warning     ") and "No space left on device" in line for line in said] == [True, True]
    disk(full=False)
    files.log_metrics({"train/loss": 4.0}, step=4)
    files.log_metrics({"train/loss": 5.0}, step=5)
    assert len(said) == 2
    rows = [json.loads(line) for line in jsonl.read_text().splitlines()]
    assert rows == [
        {"step": 1, "train/loss": 1.0, "val/loss": 9.0},
        {"step": 2, "train/loss": 2.0},
        {"step": 3, "train/loss": 3.0, "val/loss": 4.0},
        {"step": 4, "train/loss": 4.0},
        {"step": 5, "train/loss": 5.0},
    ]
    assert [(row["step"], row["val/loss"]) for row in csv.DictReader(table.open())] == [
        ("1", "9.0"), ("2", ""), ("3", "4.0"), ("4", ""), ("5", "")
    ]  # fmt: skip


def test_a_resume_on_a_full_disk_loses_no_row(tmp_path, monkeypatch):
    jsonl, table = tmp_path / "m.jsonl", tmp_path / "m.csv"
    RunFiles(jsonl, table, resume_step=None, say=print).log_metrics({"train/loss": 1.0}, step=1)
    before = jsonl.read_bytes(), table.read_bytes()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OSError, match="No space left") as refused:
        RunFiles(jsonl, table, resume_step=1, say=print)
    assert refused.value.filename == str(jsonl)
    assert (jsonl.read_bytes(), table.read_bytes()) == before
    said = []
    write_or_warn(tmp_path / "samples/a.txt", "a", said.append)
    assert said == [f"warning     {tmp_path}/samples/a.txt: cannot be written (No space left on device)"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["m.csv", "m.jsonl", "samples"]


def test_a_run_whose_folder_is_removed_continues_and_reports_it(tiny, tmp_path, monkeypatch, capsys):
    folder, write = RunFolder(tmp_path / "run"), LineFile.write

    def write_and_remove(rows, row, *, again):
        if row["step"] == 6:
            shutil.rmtree(folder.path, ignore_errors=True)
        write(rows, row, again=again)

    monkeypatch.setattr(LineFile, "write", write_and_remove)
    with pytest.raises(RunFailed, match=r"run: .*weights\.safetensors"):
        run(compose_config([*tiny, "callbacks.samples.every=1"]), folder, None)
    said = capsys.readouterr().out.splitlines()
    assert sum("cannot be written (No such file or directory); its rows are kept" in line for line in said) == 2
    assert folder.step_checkpoint(12).exists()
    assert folder.weights.exists()
