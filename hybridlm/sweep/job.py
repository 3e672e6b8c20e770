"""What is kept of a sweep on the disk: sweep.json in its folder, and job.json in the folder of each job."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from hybridlm.config.groups import groups, no_such_option
from hybridlm.config.overrides import key_of
from hybridlm.config.run import RunConfig
from hybridlm.errors import UserError
from hybridlm.files.durable import remove_partials, replaced
from hybridlm.files.home import expanded
from hybridlm.files.plain import Unreadable, read_json
from hybridlm.runs.run_folder import JOB, SWEEP, RunFolder

Status = Literal["waiting", "running", "finished", "failed", "stopped"]
LOG, LOCK = "job.log", "job.lock"
_REFERENCE = re.compile(r"\$\\*\{")  # also with backslashes, which Hydra's grammar takes away
_SIGTERM_CODES = (143, -signal.SIGTERM)


@dataclass(frozen=True)
class Job:
    """One run of a sweep. point: the values of what varies, the seed aside; started and ended: of the last attempt,
    local time with its offset from UTC; seconds: of all attempts together; error: the last line that a failed one
    left."""

    number: int
    name: str
    overrides: tuple[str, ...]
    point: Mapping[str, str]
    seed: int
    status: Status = "waiting"
    exit_code: int | None = None
    error: str | None = None
    started: str | None = None
    ended: str | None = None
    seconds: float = 0.0
    attempts: int = 0

    def begun(self) -> Job:
        return replace(
            self, status="running", exit_code=None, error=None, started=_now(), ended=None, attempts=self.attempts + 1
        )

    def done(self, code: int, folder: Path, seconds: float, error: str, *, asked: bool) -> Job:
        """After its process has ended with ``code`` (negative: the signal that killed it). error: the last line of its
        log; asked: the sweep was to stop. A run writes its summary last: what goes wrong behind that, in a logger or at
        exit, takes nothing from it."""
        status: Status = "failed"
        if RunFolder(folder).summary.is_file():
            status = "finished"
        elif code == 0:
            status = "stopped"  # by trainer.time_limit
        elif code in _SIGTERM_CODES or (asked and code == -signal.SIGKILL):
            status = "stopped"
        if status != "failed":
            said = None
        else:
            said = f"killed by {signal.Signals(-code).name}" if code < 0 else error or f"exit code {code}"
        return replace(
            self, status=status, exit_code=code, error=said, ended=_now(), seconds=round(self.seconds + seconds, 3)
        )

    def abandoned(self, folder: Path) -> Job:
        """After whatever watched it was killed: it has ended by now, how is told by what it left."""
        ended = max(_modified(folder / LOG), _modified(RunFolder(folder).metrics_jsonl))
        seconds = max(0.0, ended - datetime.fromisoformat(self.started).timestamp()) if self.started else 0.0
        status: Status = "finished" if RunFolder(folder).summary.is_file() else "stopped"
        stamp = datetime.fromtimestamp(ended).astimezone().isoformat(timespec="seconds") if ended else None
        return replace(
            self,
            status=status,
            exit_code=0 if status == "finished" else None,
            ended=stamp,
            seconds=self.seconds + seconds,
        )


_JOBS = TypeAdapter(Job)  # job.json is read strictly: someone may have edited it


@dataclass(frozen=True)
class Sweep:
    """A sweep on the disk: its folder, the folders of its jobs in the order in which they run, and where relative paths
    start from."""

    folder: Path
    jobs: tuple[str, ...]
    cwd: Path

    def job_folder(self, number: int) -> Path:
        """numbers count from 1."""
        return self.folder / self.jobs[number - 1]

    def read(self) -> list[Job]:
        """Every job as it was written last. ConfigError: one cannot be read."""
        return [_job(self.folder / name / JOB, number) for number, name in enumerate(self.jobs, 1)]

    def write(self, job: Job) -> None:
        folder = self.job_folder(job.number)
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / JOB, asdict(job))


def create(folder: Path, jobs: Sequence[Job], overrides: Sequence[str], varied: Sequence[str], command: str) -> Sweep:
    """Writes a new sweep, sweep.json last: with it, it is whole. ConfigError: the folder holds one, or cannot be
    written."""
    refuse_taken(folder)
    width = max(2, len(str(len(jobs))))
    sweep = Sweep(folder, tuple(f"{job.number:0{width}d}-{job.name}" for job in jobs), Path.cwd())
    try:
        for job in jobs:
            sweep.write(job)
        tree = {
            "overrides": list(overrides),
            "varied": list(varied),
            "jobs": list(sweep.jobs),
            "command": command,
            "cwd": str(sweep.cwd),
        }
        _write(folder / SWEEP, tree)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror or error}); name another place with hydra.sweep.dir"
        ) from None
    return sweep


def refuse_taken(folder: Path) -> None:
    """ConfigError: the folder holds a sweep."""
    if (folder / SWEEP).exists():
        raise UserError(
            f"{folder} holds a sweep already: go on with --resume {folder}, or name another folder"
            " (hydra.sweep.dir=...)"
        )


def find(name: str) -> Sweep:
    """The sweep in the folder ``name``; ``last``: the newest one below multirun/. ConfigError: there is none."""
    if name == "last":
        found = sorted(Path("multirun").glob(f"**/{SWEEP}"), key=_modified)
        if not found:
            raise UserError(f"--resume last: no sweep under {Path.cwd() / 'multirun'}; start one with hybridlm sweep")
        path = found[-1]
    else:
        path = expanded(name) / SWEEP
    tree = _read(path, f"--resume {name}: no sweep of `hybridlm sweep`")
    if not isinstance(tree.get("jobs"), list) or not all(isinstance(job, str) for job in tree["jobs"]):
        raise UserError(f"{path}: lists no jobs")
    if wrong := [job for job in tree["jobs"] if job in ("", ".", "..") or Path(job).name != job or "\\" in job]:
        raise UserError(f"{path}: jobs: {wrong[0]!r} is no folder in that of the sweep")
    remove_partials(path.parent)
    cwd = Path(str(tree.get("cwd", "")))
    return Sweep(path.parent, tuple(tree["jobs"]), cwd if cwd.is_dir() else Path.cwd())


def _job(path: Path, number: int) -> Job:
    tree = _read(path, "the sweep lost a job")
    remove_partials(path.parent)
    try:
        job = _JOBS.validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: is no job ({'.'.join(map(str, first['loc']))}: {first['msg']})") from None
    if problem := next((problem for line in job.overrides if (problem := foreign(line))), None):
        raise UserError(f"{path}: overrides: {problem}")
    if job.number != number:
        raise UserError(f"{path}: number = {job.number}: it is job {number} of {SWEEP}")
    return job


def _read(path: Path, problem: str) -> dict[str, Any]:
    try:
        tree = read_json(path)
    except Unreadable as error:
        raise UserError(f"{problem}: {path} (it is not there)" if not path.exists() else f"{path}: {error}") from None
    return tree if isinstance(tree, dict) else {}


def foreign(override: str) -> str | None:
    """Why an override is none that a job may have been written with; None: it sets a field of ours, or chooses one of
    our options.

    A job is written down as plain values and read again later, and a folder may come from someone else: what Hydra
    would read in it (its own settings, files from elsewhere, values of the environment) is the command line's alone.
    """
    sign, key = override[: len(override) - len(override.lstrip("+~"))], key_of(override)
    value, section, known = override.partition("=")[2], key.partition(".")[0], groups()
    if _REFERENCE.search(override):
        return f"{override!r}: a job takes values, not ${{...}}"
    if key in known and sign in ("", "~"):
        if value in known[key] or value == "null" or (sign and not value):
            return None
        return no_such_option(key, value, known)
    if section in RunConfig.model_fields and section != "ckpt" and re.fullmatch(r"[\w.-]+", key):
        return None
    return f"{override!r}: sets no field of the configuration and chooses no option of its groups"


def _write(path: Path, tree: Mapping[str, object]) -> None:
    with replaced(path) as new:
        new.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _modified(path: Path) -> float:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return 0.0


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
