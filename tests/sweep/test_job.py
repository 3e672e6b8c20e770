"""sweep.json and job.json: what is refused in a folder that is to be resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hybridlm.errors import UserError
from hybridlm.runs.run_folder import JOB
from hybridlm.sweep.job import Job, create, find


def sweep_of(folder):
    job = Job(number=1, name="a", overrides=("seed=1",), point={"seed": "1"}, seed=1)
    return create(folder, [job], ["seed=1"], ["seed"], "hybridlm sweep seed=1")


@pytest.mark.parametrize(
    ("edit", "part"),
    [
        ({"number": 7}, r"number = 7: sweep\.json lists it as job 1"),
        ({"status": "done"}, r"status = 'done': not one of waiting"),
        ({"seconds": None}, r"seconds = null: expected"),
        ({"overrides": "size=tiny"}, r"overrides = .*expected"),
    ],
)
def test_a_wrongly_edited_job_is_refused(tmp_path, edit, part):
    sweep = sweep_of(tmp_path / "s")
    path = sweep.job_folder(1) / JOB
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    with pytest.raises(UserError, match=part):
        sweep.read()


def test_what_resume_refuses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, part in (("last", "--resume last: no sweep under"), ("nowhere", "--resume nowhere: no sweep of")):
        with pytest.raises(UserError, match=part):
            find(name)
    sweep = sweep_of(Path("multirun/2026/a"))
    assert find("last").jobs == sweep.jobs == ("01-a",)
    with pytest.raises(UserError, match="already holds a sweep: resume it with --resume"):
        sweep_of(Path("multirun/2026/a"))
    (sweep.job_folder(1) / JOB).write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        find("last").read()
    (sweep.job_folder(1) / JOB).unlink()
    with pytest.raises(UserError, match="a job of this sweep is missing"):
        find("last").read()
