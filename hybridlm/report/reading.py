"""What a run folder says. Whatever a killed process left half-written is read as far as it goes."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hybridlm.config.overrides import key_of, value_of
from hybridlm.errors import UserError, printable
from hybridlm.report import facts
from hybridlm.report.facts import Facts
from hybridlm.runs.run_folder import JOB, SWEEP, RunFolder

FINISHED = "finished"
_NOT_RUNS = {"checkpoints", "wandb", "tensorboard", "samples"}  # folders of a run, which hold no others
_HYDRA = ".hydra"
_LOGGED_ERROR = re.compile(r"^\S+ \S+ ERROR \S+: (.*)$", re.MULTILINE)  # as conf/hydra/job_logging/plain.yaml has it
_SAMPLE_LETTERS = 2_000
_STARTS = ("ckpt", "hydra")  # overrides of one start, not of the run


@dataclass(frozen=True)
class Run:
    """One run, or a job of a sweep that has left no run.

    status: finished, failed, stopped, running, waiting; unfinished where no runner kept a record and there is no
    summary. config: of config.yaml, by dotted names; empty where the run did not get so far. rows: of metrics.jsonl, by
    rising step. model: the model section of config.yaml as JSON, empty where there is none.
    """

    folder: Path
    name: str
    status: str
    error: str | None
    overrides: tuple[str, ...]
    started_in: str | None
    config: Facts
    summary: Facts
    job: Facts
    rows: tuple[Facts, ...]
    evaluation: Facts
    samples: str
    layers: str
    plan: str
    model: str

    @property
    def finished(self) -> bool:
        return self.status == FINISHED

    @property
    def seed(self) -> int | None:
        seed = self.config.get("seed", self.job.get("seed"))
        return seed if isinstance(seed, int) else None

    @property
    def seconds(self) -> float | None:
        """Of all attempts where a runner counted them, else of the last start."""
        return first_number(self.job.get("seconds"), self.summary.get("seconds"))

    def setting(self, key: str) -> str | None:
        """The value of a field (``model.pattern``) or a group (``size``), as text; None where the run does not say."""
        if key in self.config:
            return shown(self.config[key])
        given = value_of(self.overrides, key)
        return shown(self.config[f"{key}.name"]) if given is None and f"{key}.name" in self.config else given


@dataclass(frozen=True)
class Sweep:
    """A folder with sweep.json. varied: the fields that differ between its jobs."""

    folder: Path
    command: str
    varied: tuple[str, ...]


def first_number(*values: object) -> float | None:
    return next((found for found in map(facts.number, values) if found is not None), None)


def _said(line: str) -> None:
    print(f"skipped {printable(line)}", file=sys.stderr)


def shown(value: object) -> str:
    """A value of a configuration as YAML would have it on one line."""
    return value if isinstance(value, str) else json.dumps(value)


def read_folders(folders: list[Path], skip: Callable[[str], None] = _said) -> tuple[list[Run], list[Sweep]]:
    """All runs at and below ``folders``, each once, by path. skip: gets a line about each folder that is left out,
    which is wrong inside.

    Raises:
        ConfigError: a folder does not exist, or there is no run in any of them.
    """
    missing = [
        f"{folder}: {'a file, not a folder' if folder.exists() else 'no such folder'}"
        for folder in folders
        if not folder.is_dir()
    ]
    if missing:
        raise UserError(missing)
    found = {path.resolve(): path for folder in folders for path in _below(folder)}
    paths = [found[path] for path in sorted(found, key=_natural)]
    base = _common([path.resolve() for path in paths])
    runs, sweeps = [], []
    for path in paths:
        try:
            run, sweep = _read(path, base), _sweep(path)
        except facts.BadRun as error:
            skip(f"{path}: {error}")
            continue
        runs += [] if run is None else [run]
        sweeps += [] if sweep is None else [sweep]
    if not runs:
        raise UserError(
            f"no run in {', '.join(map(str, folders))}: expected folders with config.yaml (python train.py) or job.json"
        )
    return runs, sweeps


def _below(folder: Path) -> Iterator[Path]:
    """Folders that hold a run, a job or a sweep, or what Hydra wrote before a job failed."""
    for place, folders, files in os.walk(folder):
        if {"config.yaml", JOB, SWEEP}.intersection(files) or _HYDRA in folders:
            yield Path(place)
        folders[:] = [name for name in folders if name not in _NOT_RUNS and not name.startswith(".")]


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts 10 behind 9."""
    return [(int(part) if part.isdecimal() else -1, part) for part in path.parts]


def _common(paths: list[Path]) -> Path:
    if len(paths) == 1:
        return paths[0].parent
    return Path(os.path.commonpath(paths)) if paths else Path()


def _read(path: Path, base: Path) -> Run | None:
    folder = RunFolder(path)
    config = facts.mapping(folder.config) or facts.mapping(path / _HYDRA / "config.yaml")
    job, summary = facts.job(path / JOB), facts.summary(folder.summary)
    model = config.get("model")
    if not job and not isinstance(model, Mapping):
        return None  # a sweep's own folder, or a config.yaml of something else
    rows = facts.rows(folder.metrics_jsonl)
    error = None if summary else _error(folder, job, rows)
    samples = facts.words(folder.samples)
    return Run(
        folder=path,
        name=os.path.relpath(path.resolve(), base),
        status=FINISHED if summary else _status(job, folder),
        error=error,
        overrides=_overrides(folder, job),
        started_in=_started_in(path),
        config=dict(_flat(config)),
        summary=summary,
        job=job,
        rows=rows,
        evaluation=facts.evaluation(folder.evaluation),
        samples=samples[:_SAMPLE_LETTERS] + (" ..." if len(samples) > _SAMPLE_LETTERS else ""),
        layers=facts.words(folder.layers),
        plan=facts.words(folder.plan),
        model=json.dumps(model) if isinstance(model, Mapping) else "",
    )


def _status(job: Facts, folder: RunFolder) -> str:
    """Of a run without a summary: what its runner says, but not that it has finished."""
    said = str(job.get("status", FINISHED))
    if said != FINISHED:
        return said
    return "unfinished" if job or folder.is_run() else "failed"


def _error(folder: RunFolder, job: Facts, rows: tuple[Facts, ...]) -> str:
    """In a line, why there is no summary, as far as the folder tells."""
    if job.get("error"):
        return " ".join(str(job["error"]).split())
    if job.get("status") in ("waiting", "running"):
        return ""
    if folder.summary.exists():
        return "summary.json is damaged"
    if logged := [
        line for log in sorted(folder.path.glob("*.log")) for line in _LOGGED_ERROR.findall(facts.words(log, end=True))
    ]:
        return str(logged[-1])
    return (
        f"no summary.json; the last metrics are of step {rows[-1]['step']}"
        if rows
        else "no summary.json and no metrics"
    )


def _sweep(path: Path) -> Sweep | None:
    found = facts.SweepFacts.model_validate(facts.sweep(path / SWEEP))
    command = " ".join(found.command) if isinstance(found.command, list) else found.command
    return Sweep(path, command, tuple(found.varied)) if (path / SWEEP).exists() else None


def _overrides(folder: RunFolder, job: Facts) -> tuple[str, ...]:
    """Without the signs that the entry point puts in front of fields."""
    recorded = job.get("overrides")
    try:
        lines = folder.overrides() or (list(map(str, recorded)) if isinstance(recorded, list) else [])
    except (UserError, OSError, UnicodeDecodeError):
        lines = []
    kept = [line for line in lines if not key_of(line).startswith(_STARTS)]
    return tuple(line.lstrip("+") if "=" in line else line for line in kept)


def _started_in(path: Path) -> str | None:
    """The folder that the run's relative paths start from, as Hydra recorded it."""
    runtime = facts.mapping(path / _HYDRA / "hydra.yaml")
    for key in ("hydra", "runtime"):
        inner = runtime.get(key)
        runtime = inner if isinstance(inner, Mapping) else {}
    cwd = runtime.get("cwd")
    return cwd if isinstance(cwd, str) else None


def _flat(tree: Facts, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
