"""A sweep on disk: sweep.json in its folder, and job.json in the folder of each job."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import ConfigDict, Field

from hybridlm.config.groups import groups, no_such_option
from hybridlm.config.overrides import key_of
from hybridlm.config.problems import recorded
from hybridlm.config.run import RunConfig
from hybridlm.config.section import Section, Strings
from hybridlm.errors import UserError
from hybridlm.files.durable import remove_partials, replaced
from hybridlm.files.home import expanded
from hybridlm.files.plain import Unreadable, read_json
from hybridlm.runs.run_folder import JOB, SWEEP, RunFolder

LOG = "job.log"
_REFERENCE = re.compile(r"\$\\*\{")  # also with backslashes, which Hydra's grammar removes
_SIGTERM_CODES = (143, -signal.SIGTERM)


class Job(Section):
    """One run of a sweep. point: the varied values except the seed; started, ended: of the last attempt, in local time
    with its UTC offset; seconds: of all attempts together; error: the last line of a failed one."""

    model_config = ConfigDict(extra="ignore")

    number: int
    name: str
    overrides: Strings
    point: dict[str, str]
    seed: int
    status: Literal["waiting", "running", "finished", "failed", "stopped"] = "waiting"
    exit_code: int | None = None
    error: str | None = None
    started: str | None = None
    ended: str | None = None
    seconds: float = 0.0
    attempts: int = 0

    def begun(self) -> Job:
        attempt = {"status": "running", "exit_code": None, "error": None, "started": _now(), "ended": None}
        return self.model_copy(update={**attempt, "attempts": self.attempts + 1})

    def done(self, code: int, folder: Path, seconds: float, error: str, *, stopping: bool) -> Job:
        """After its process has exited with ``code`` (negative: the signal that killed it).

        error: the last line of its log; stopping: the sweep was being stopped. A run writes its summary last: an error
        after that, in a logger or at exit, does not undo it.
        """
        reason = None
        if RunFolder(folder).summary.is_file():
            status = "finished"
        elif code in (0, *_SIGTERM_CODES) or (stopping and code == -signal.SIGKILL):  # 0: by trainer.time_limit
            status = "stopped"
        else:
            status = "failed"
            reason = f"killed by {signal.Signals(-code).name}" if code < 0 else error or f"exit code {code}"
        ended = {"status": status, "exit_code": code, "error": reason, "ended": _now()}
        return self.model_copy(update={**ended, "seconds": round(self.seconds + seconds, 3)})

    def abandoned(self, folder: Path) -> Job:
        """After its runner was killed and it has ended: what it left tells how."""
        ended = max(_modified(folder / LOG), _modified(RunFolder(folder).metrics_jsonl))
        began = datetime.fromisoformat(self.started).timestamp() if self.started else ended
        status, code = ("finished", 0) if RunFolder(folder).summary.is_file() else ("stopped", None)
        stamp = datetime.fromtimestamp(ended).astimezone().isoformat(timespec="seconds") if ended else None
        seconds = self.seconds + max(0.0, ended - began)
        return self.model_copy(update={"status": status, "exit_code": code, "ended": stamp, "seconds": seconds})


S = TypeVar("S", bound=Section)


class Sweep(Section):
    """sweep.json. folder: where it is; jobs: the folders of its jobs in the order in which they run; cwd: where
    relative paths start; varied: the fields that differ between the jobs."""

    model_config = ConfigDict(extra="ignore")

    folder: Path = Field(default=Path(), exclude=True)
    jobs: Strings = ()
    cwd: str = ""
    overrides: Strings = ()
    varied: Strings = ()
    command: str = ""

    def job_folder(self, number: int) -> Path:
        """Numbers count from 1."""
        return self.folder / self.jobs[number - 1]

    def read(self) -> list[Job]:
        """Every job as last written. UserError: one cannot be read, or was edited into something else."""
        return [_job(self.folder / name / JOB, number) for number, name in enumerate(self.jobs, 1)]

    def write(self, job: Job) -> None:
        folder = self.job_folder(job.number)
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / JOB, job)


def create(folder: Path, jobs: Sequence[Job], overrides: Sequence[str], varied: Sequence[str], command: str) -> Sweep:
    """Writes a new sweep; sweep.json comes last and makes it complete. UserError: the folder holds a sweep, or cannot
    be written."""
    refuse_taken(folder)
    width = max(2, len(str(len(jobs))))
    names = tuple(f"{job.number:0{width}d}-{job.name}" for job in jobs)
    sweep = Sweep(
        folder=folder,
        jobs=names,
        cwd=str(Path.cwd()),
        overrides=tuple(overrides),
        varied=tuple(varied),
        command=command,
    )
    try:
        for job in jobs:
            sweep.write(job)
        _write(folder / SWEEP, sweep)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror or error}); choose another folder with hydra.sweep.dir"
        ) from None
    return sweep


def refuse_taken(folder: Path) -> None:
    """UserError: the folder holds a sweep."""
    if (folder / SWEEP).exists():
        raise UserError(
            f"{folder} already holds a sweep: resume it with --resume {folder}, or choose another folder"
            " (hydra.sweep.dir=...)"
        )


def find(name: str) -> Sweep:
    """The sweep in the folder ``name``; ``last``: the newest one under multirun/. UserError: there is none."""
    path = expanded(name) / SWEEP
    if name == "last":
        newest = max(Path("multirun").glob(f"**/{SWEEP}"), key=_modified, default=None)
        if newest is None:
            raise UserError(f"--resume last: no sweep under {Path.cwd() / 'multirun'}; start one with hybridlm sweep")
        path = newest
    sweep = _read(path, Sweep, f"--resume {name}: no sweep of `hybridlm sweep`")
    if not sweep.jobs:
        raise UserError(f"{path}: jobs: there are none")
    if wrong := [job for job in sweep.jobs if job in ("", ".", "..") or Path(job).name != job or "\\" in job]:
        raise UserError(f"{path}: jobs: {wrong[0]!r} is not a folder inside the sweep's folder")
    cwd = Path(sweep.cwd) if Path(sweep.cwd).is_dir() else Path.cwd()
    return sweep.model_copy(update={"folder": path.parent, "cwd": str(cwd)})


def _job(path: Path, number: int) -> Job:
    job = _read(path, Job, "a job of this sweep is missing")
    if problem := next((problem for line in job.overrides if (problem := foreign(line))), None):
        raise UserError(f"{path}: overrides: {problem}")
    if job.number != number:
        raise UserError(f"{path}: number = {job.number}: {SWEEP} lists it as job {number}")
    return job


def _read(path: Path, kind: type[S], missing: str) -> S:
    """A file that someone may have edited; also removes partial files that a crash left in its folder."""
    try:
        content = read_json(path)
    except Unreadable as error:
        raise UserError(f"{path}: {error}" if path.exists() else f"{missing}: {path} does not exist") from None
    remove_partials(path.parent)
    return recorded(kind, content, path)


def foreign(override: str) -> str | None:
    """Why a stored job may not contain an override; None: it sets one of our fields or chooses one of our options.

    A job is stored as plain values and read again later, and a folder may come from someone else: whatever else Hydra
    would interpret (its own settings, files from elsewhere, environment variables) is for the command line only.
    """
    sign, key = override[: len(override) - len(override.lstrip("+~"))], key_of(override)
    value, section, known = override.partition("=")[2], key.partition(".")[0], groups()
    if _REFERENCE.search(override):
        return f"{override!r}: a job takes values, not ${{...}}"
    if key in known and sign in ("", "~"):
        legal = value in known[key] or value == "null" or (sign and not value)
        return None if legal else no_such_option(key, value, known)
    if section in RunConfig.model_fields and section != "ckpt" and re.fullmatch(r"[\w.-]+", key):
        return None
    return f"{override!r}: neither a field of the configuration nor an option of its groups"


def _write(path: Path, content: Section) -> None:
    with replaced(path) as new:
        new.write_text(json.dumps(content.model_dump(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _modified(path: Path) -> float:
    return os.stat(path).st_mtime if path.exists() else 0.0


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
