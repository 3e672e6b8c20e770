"""Finds run folders and reads them, whoever wrote them. A file that a killed process left half-written is read as far
as it goes; content that no version of hybridlm writes raises BadRun."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from hybridlm.config.overrides import key_of, value_of
from hybridlm.config.section import Section
from hybridlm.errors import UserError, printable
from hybridlm.files.plain import MAX_BYTES, Malformed, Unreadable, open_regular, parse_json, parse_yaml, read_text
from hybridlm.runs.run_folder import JOB, SWEEP, RunFolder
from hybridlm.sweep.job import Job, Sweep

JsonObject = Mapping[str, object]
_METRICS_BYTES = 2**27  # 200 thousand logged steps
_TEXT_BYTES = 2**20
_LARGEST = 1e30  # larger values are not measurements
_METRICS = TypeAdapter[Any](dict[str, float | list[float] | None], config=ConfigDict(strict=True))
R = TypeVar("R", bound=Section)
_SUMMARY = TypeAdapter[Any](dict[str, bool | float | str | None], config=ConfigDict(strict=True))
FINISHED = "finished"
_NOT_RUNS = {"checkpoints", "wandb", "tensorboard", "samples"}  # subfolders of a run that hold no other runs
_HYDRA = ".hydra"
_LOGGED_ERROR = re.compile(r"^\S+ \S+ ERROR \S+: (.*)$", re.MULTILINE)  # of conf/hydra/job_logging/plain.yaml
_SAMPLE_CHARACTERS = 2_000
_PER_START = ("ckpt", "hydra")  # overrides of a single start, not of the run


class BadRun(ValueError):
    """A run folder cannot be read: which file, and why."""


@dataclass(frozen=True)
class Run:
    """One run, or a job of a sweep that left no run.

    status: finished, failed, stopped, running, waiting; unfinished if no runner kept a record and there is no summary.
    config: config.yaml by dotted names, empty if the run did not get that far. rows: metrics.jsonl by ascending step.
    texts: what it wrote for people to read, by title. model: the model section of config.yaml as JSON, or empty.
    """

    folder: Path
    name: str
    status: str
    error: str | None
    overrides: tuple[str, ...]
    started_in: str | None
    config: JsonObject
    summary: JsonObject
    job: Job | None
    rows: tuple[JsonObject, ...]
    evaluation: JsonObject
    texts: Mapping[str, str]
    model: str

    @property
    def finished(self) -> bool:
        return self.status == FINISHED

    @property
    def seed(self) -> int | None:
        seed = self.config.get("seed", self.job.seed if self.job else None)
        return seed if isinstance(seed, int) else None

    @property
    def seconds(self) -> float | None:
        """All attempts together if a runner counted them, else the last start."""
        return number(self.job.seconds if self.job else self.summary.get("seconds"))

    @property
    def command(self) -> str:
        """The shell command that repeats the run, with the overrides it was started with."""
        return shlex.join(["python", "train.py", *(" ".join(line.split("\n")) for line in self.overrides)])

    def setting(self, key: str) -> str | None:
        """The value of a field (``model.pattern``) or a group (``size``) as text; None if the run does not record
        it."""
        if key in self.config:
            return as_text(self.config[key])
        given = value_of(self.overrides, key)
        return as_text(self.config[f"{key}.name"]) if given is None and f"{key}.name" in self.config else given


def as_text(value: object) -> str:
    """A value of the configuration in one line, as YAML writes it."""
    return value if isinstance(value, str) else json.dumps(value)


def read_folders(folders: list[Path]) -> tuple[list[Run], list[Sweep]]:
    """All runs in and below ``folders``, each once, by path; prints a line about each folder that is left out because
    of its content.

    Raises:
        UserError: a folder does not exist, or none of them holds a run.
    """
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise UserError(
            [f"{path}: {'a file, not a folder' if path.exists() else 'no such folder'}" for path in missing]
        )
    found = {path.resolve(): path for folder in folders for path in _candidates(folder)}
    resolved = sorted(found, key=_natural)
    base = resolved[0].parent if len(resolved) == 1 else Path(os.path.commonpath(resolved or [Path()]))
    runs, sweeps = [], []
    for path in map(found.__getitem__, resolved):
        try:
            run, sweep = _read(path, base), read_record(path / SWEEP, Sweep)
        except BadRun as error:
            print(f"skipped {printable(f'{path}: {error}')}", file=sys.stderr)
            continue
        runs += [] if run is None else [run]
        sweeps += [] if sweep is None else [sweep]
    if not runs:
        raise UserError(
            f"no run in {', '.join(map(str, folders))}: expected folders with config.yaml (python train.py) or job.json"
        )
    return runs, sweeps


def _candidates(folder: Path) -> Iterator[Path]:
    """Folders that hold a run, a job or a sweep, or what Hydra wrote before a job failed."""
    for place, folders, files in os.walk(folder):
        if {"config.yaml", JOB, SWEEP}.intersection(files) or _HYDRA in folders:
            yield Path(place)
        folders[:] = [name for name in folders if name not in _NOT_RUNS and not name.startswith(".")]


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts 9 before 10."""
    return [(int(part) if part.isdecimal() else -1, part) for part in path.parts]


def _read(path: Path, base: Path) -> Run | None:
    """None for the folder of a sweep itself, or a config.yaml of another program."""
    folder = RunFolder(path)
    config = read_mapping(folder.config) or read_mapping(path / _HYDRA / "config.yaml")
    job, summary = read_record(path / JOB, Job), read_summary(folder.summary)
    model = config.get("model")
    if job is None and not isinstance(model, Mapping):
        return None
    rows = read_metrics(folder.metrics_jsonl)
    status, error = (FINISHED, None) if summary else _without_summary(folder, job, rows)
    samples = read_excerpt(folder.samples)
    texts = {
        "layers": read_excerpt(folder.layers),
        "samples": samples[:_SAMPLE_CHARACTERS] + (" ..." if len(samples) > _SAMPLE_CHARACTERS else ""),
        "plan": read_excerpt(folder.plan),
    }
    cwd = dict(_flat(read_mapping(path / _HYDRA / "hydra.yaml"))).get("hydra.runtime.cwd")
    return Run(
        folder=path,
        name=os.path.relpath(path.resolve(), base),
        status=status,
        error=error,
        overrides=_overrides(folder, job),
        started_in=cwd if isinstance(cwd, str) else None,
        config=dict(_flat(config)),
        summary=summary,
        job=job,
        rows=rows,
        evaluation=read_object(folder.evaluation),
        texts={title: text for title, text in texts.items() if text},
        model=json.dumps(model) if isinstance(model, Mapping) else "",
    )


def _without_summary(folder: RunFolder, job: Job | None, rows: tuple[JsonObject, ...]) -> tuple[str, str]:
    """The status of a run without a summary, and the reason in one line, as far as the folder tells."""
    status = "unfinished" if job or folder.is_run() else "failed"
    if job and job.status != FINISHED:
        status = job.status
    if status in ("waiting", "running") or (job and job.error):
        return status, " ".join(((job and job.error) or "").split())
    if folder.summary.exists():
        return status, "summary.json is damaged"
    logs = (read_excerpt(log, end=True) for log in sorted(folder.path.glob("*.log")))
    if logged := [str(line) for log in logs for line in _LOGGED_ERROR.findall(log)]:
        return status, logged[-1]
    last = f"; the last metrics are from step {rows[-1]['step']}" if rows else " and no metrics"
    return status, f"no summary.json{last}"


def _overrides(folder: RunFolder, job: Job | None) -> tuple[str, ...]:
    """Without the signs that the entry point puts in front of fields."""
    try:
        lines = folder.overrides() or (list(job.overrides) if job else [])
    except (UserError, OSError, UnicodeDecodeError):
        lines = []
    kept = [line for line in lines if not key_of(line).startswith(_PER_START)]
    return tuple(line.lstrip("+") if "=" in line else line for line in kept)


def _flat(tree: JsonObject, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def number(value: object) -> float | None:
    """``value`` as a float, infinite if it is too large to be a measurement; None if it is not a number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if not abs(value) >= _LARGEST else math.copysign(math.inf, value)


def parsed_number(text: str) -> float | None:
    """The finite number that ``text`` spells, or None."""
    try:
        value = number(float(text))
    except ValueError:
        return None
    return value if value is not None and math.isfinite(value) else None


def read_record(path: Path, kind: type[R]) -> R | None:
    """job.json or sweep.json; None if it does not exist or was cut short."""
    content = read_object(path)
    with _readable(path.name):
        return kind.model_validate(content) if content else None


def read_summary(path: Path) -> JsonObject:
    """Strings and numbers."""
    summary = read_object(path)
    with _readable(path.name):
        _SUMMARY.validate_python(summary)
    return summary


def read_object(path: Path) -> JsonObject:
    """The object in a JSON file; empty if there is none, or the file was cut short."""
    with _readable(path.name), suppress(Malformed):
        content = parse_json(_text(path))
        return content if isinstance(content, dict) else {}
    return {}


def read_mapping(path: Path) -> JsonObject:
    """The mapping in a YAML file; empty if there is none."""
    with _readable(path.name):
        content = parse_yaml(_text(path))
    return content if isinstance(content, dict) else {}


def read_metrics(path: Path) -> tuple[JsonObject, ...]:
    """The rows of metrics.jsonl by ascending step. A line that a crash cut short is left out."""
    rows: dict[int, JsonObject] = {}
    with _readable(path.name):
        lines = _text(path, _METRICS_BYTES).splitlines()
    for line_number, line in enumerate(lines, 1):
        with _readable(f"{path.name}, line {line_number}"), suppress(Malformed):
            row = parse_json(line)
            step = row.get("step") if isinstance(row, dict) else None
            if isinstance(row, dict) and isinstance(step, int) and 0 <= step < 2**53:
                _METRICS.validate_python(row)
                rows[step] = row
    return tuple(rows[step] for step in sorted(rows))


def read_excerpt(path: Path, *, end: bool = False) -> str:
    """The first megabyte of a text file (``end``: the last one); empty if there is no file."""
    if not path.exists():
        return ""
    with _readable(path.name), open_regular(path) as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TEXT_BYTES) if end else 0)
        return file.read(_TEXT_BYTES).decode("utf-8", "replace")


def _text(path: Path, limit: int = MAX_BYTES) -> str:
    return read_text(path, limit) if path.exists() else ""


@contextmanager
def _readable(place: str) -> Iterator[None]:
    try:
        yield
    except Unreadable as error:
        raise BadRun(f"{place}: {error}") from None
    except ValidationError as error:
        field = printable(str(error.errors()[0]["loc"][0]))[:80]
        raise BadRun(f"{place}: {field} has a value that no run writes") from None
