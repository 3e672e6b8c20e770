"""Damaged files of a run folder are read as far as they go (test_hostile_runs.py: files that no run writes)."""

from __future__ import annotations

import pytest
from run_folders import make_run

from hybridlm.report.runs import read_folders


def read(folder):
    return read_folders([folder])[0]


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "\x00\xff"])
def test_a_damaged_summary(tmp_path, text):
    folder = make_run(tmp_path / "a")
    (folder / "summary.json").write_text(text)
    (run,) = read(folder)
    assert (run.status, run.error, run.summary) == ("unfinished", "summary.json is damaged", {})


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "config.yaml", ".hydra/overrides.yaml", "eval.json", "job.json", "samples.txt"]
)
@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\x00", b"- [", b"{}", b"null", b"[1, 2]", b"'x'", b'{"results": 3, "status": 1}']
)
def test_any_other_damaged_file(tmp_path, name, content):
    """Beside a good run: what can be read of the other is."""
    make_run(tmp_path / "good", pattern="T")
    folder = make_run(tmp_path / "bad")
    (folder / name).write_bytes(content)
    assert "good" in [run.name for run in read(tmp_path)]


def test_lines_without_a_step_are_skipped(tmp_path):
    folder = make_run(tmp_path / "a")
    (folder / "metrics.jsonl").write_text(
        '{"step": 2, "train/loss": NaN}\n[]\n{"loss": 1}\n7\n{"step": 1}\n{"step": 2, "x": 1}\n'
    )
    (run,) = read(folder)
    assert [row["step"] for row in run.rows] == [1, 2]
    assert run.rows[1] == {"step": 2, "x": 1}
