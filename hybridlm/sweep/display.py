"""What a person sees of a sweep: a table that is kept up to date in a terminal, a line per event elsewhere."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hybridlm.config.duration import clock
from hybridlm.errors import harmless
from hybridlm.files.plain import Unreadable, open_regular, parse_json, read_json
from hybridlm.runs.run_folder import RunFolder
from hybridlm.sweep.estimate import Work, seconds_left
from hybridlm.sweep.job import LOG, Job

_STYLES = {"running": "cyan", "finished": "green", "failed": "bold red", "stopped": "yellow", "waiting": "dim"}
_TAIL = 8192  # bytes of metrics.jsonl that are read for its last rows


class Show:
    """Prints the course of a sweep. With ``live`` or without: in ``with``."""

    def __init__(self, total: int, work: Mapping[int, Work], slots: int, console: Console | None = None) -> None:
        """work: of the jobs that are to run, by number; slots: jobs at once."""
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._total, self._work, self._slots = total, work, slots
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None

    def __enter__(self) -> Show:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.update(Text(""), refresh=True)
            self._live.stop()

    def say(self, line: str, style: str = "") -> None:
        self._console.print(Text(harmless(line), style))

    def began(self, job: Job) -> None:
        if self._live is None:
            self.say(f"started   {self._place(job)}" + (f"  (attempt {job.attempts})" if job.attempts > 1 else ""))

    def ended(self, job: Job, folder: Path, jobs: Sequence[Job], running: Mapping[int, tuple[float, Path]]) -> None:
        """Also in a terminal, above the table: what failed is read at once. jobs, running: as of ``tick``."""
        text = (
            f"{job.status:9} {self._place(job)} "
            f" {clock(job.seconds)}{_score(folder) if job.status == 'finished' else ''}"
        )
        if job.error is not None:
            text += f"  {job.error}\n          all of it: {folder / LOG}"
        elif self._live is None:
            rows = {number: (seconds, _row(at)) for number, (seconds, at) in running.items()}
            text += "".join(f"  {left}" for left in self._left(jobs, rows))
        self.say(text, _STYLES[job.status])

    def tick(self, jobs: Sequence[Job], running: Mapping[int, tuple[float, Path]]) -> None:
        """jobs: all; running: number to seconds so far and folder."""
        if self._live is None:
            return
        counts = Counter[str](job.status for job in jobs)
        rows = {number: (seconds, _row(folder)) for number, (seconds, folder) in running.items()}
        caption = ", ".join(
            [*(f"{counts[status]} {status}" for status in _STYLES if counts[status]), *self._left(jobs, rows)]
        )
        table = Table(title=caption, title_justify="left", title_style="")
        for name, justify in (
            ("job", "left"),
            ("step", "right"),
            ("loss", "right"),
            ("val bits/byte", "right"),
            ("time", "right"),
        ):
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        for job in jobs:
            if job.number in running:
                seconds, row = rows[job.number]
                cells = [
                    _number(row.get(name), form)
                    for name, form in (("step", ".0f"), ("train/loss", ".4f"), ("val/bpb", ".4f"))
                ]
                table.add_row(self._place(job), *cells, clock(seconds))
        self._live.update(table, refresh=True)

    def finish(self, jobs: Sequence[Job], folder: Path) -> None:
        """The last lines: how many ended how, what failed, and what next."""
        counts = Counter[str](job.status for job in jobs)
        spent = clock(sum(job.seconds for job in jobs))
        self.say(
            f"{', '.join(f'{counts[status]} {status}' for status in _STYLES if counts[status])} of {self._total};"
            f" {spent} of jobs in all"
        )
        failed = [job for job in jobs if job.status == "failed"]
        if failed:
            width = max(len(self._place(job)) for job in failed)
            for job in failed:
                self.say(f"  {self._place(job):{width}}  {job.error}", _STYLES["failed"])
        if any(job.status != "finished" for job in jobs):
            self.say(f"go on (finished jobs are left alone): hybridlm sweep --resume {shlex.quote(str(folder))}")
        if counts["finished"]:
            self.say(f"compare them: hybridlm report {shlex.quote(str(folder))}")

    def _left(self, jobs: Sequence[Job], rows: Mapping[int, tuple[float, Mapping[str, Any]]]) -> list[str]:
        """The time that is left, where it can be told and there is some. rows: number to seconds so far and newest
        metrics."""
        steps = {
            number: (seconds, step if isinstance(step := row.get("step"), int) else 0)
            for number, (seconds, row) in rows.items()
        }
        left = seconds_left(jobs, steps, self._work, self._slots)
        return [f"about {clock(left)} left"] if left else []

    def _place(self, job: Job) -> str:
        return f"{job.number:>{len(str(self._total))}}/{self._total} {job.name}"


def last_row(metrics: Path) -> dict[str, Any]:
    """The newest value of each metric among the last rows of metrics.jsonl; empty where there is none yet."""
    found: dict[str, Any] = {}
    try:
        with open_regular(metrics) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except (OSError, Unreadable):
        return found
    for line in lines:
        try:
            row = parse_json(line)
        except Unreadable:  # cut, or being written
            continue
        if isinstance(row, dict):
            found |= row
    return found


def _row(folder: Path) -> dict[str, Any]:
    return last_row(RunFolder(folder).metrics_jsonl)


def _number(value: object, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else ""


def _score(folder: Path) -> str:
    try:
        summary = read_json(RunFolder(folder).summary)
    except Unreadable:
        return ""
    score = summary.get("val/bpb") if isinstance(summary, dict) else None
    return f"  {score:.4f} bits per byte" if isinstance(score, int | float) else ""
