"""What a user sees of a running sweep: a live table on a terminal, a line per event elsewhere."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from hybridlm.config.duration import clock
from hybridlm.errors import harmless
from hybridlm.files.plain import Unreadable, open_regular, parse_json, read_json
from hybridlm.runs.run_folder import RunFolder
from hybridlm.sweep.job import LOG, Job

_STYLES = {"running": "cyan", "finished": "green", "failed": "bold red", "stopped": "yellow", "waiting": "dim"}
_TAIL = 8192  # bytes of metrics.jsonl that are read for its last rows
_SHOWN = {"step": ("step", ".0f"), "loss": ("train/loss", ".4f"), "val bits/byte": ("val/bpb", ".4f")}
Running = Mapping[int, tuple[float, Path]]  # by job number: seconds so far, folder


class Display:
    """Prints the progress of a sweep."""

    def __init__(self, total: int, slots: int, console: Console | None = None) -> None:
        """slots: parallel jobs."""
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._total, self._slots = total, slots
        self._live = Live(console=self._console, auto_refresh=False, transient=True)

    def shown(self) -> AbstractContextManager[object]:
        """Within it the table is on the terminal, if there is one."""
        return self._live if self._console.is_terminal else nullcontext()

    def say(self, line: str, style: str = "") -> None:
        self._console.print(Text(harmless(line), style))

    def started(self, job: Job) -> None:
        if not self._console.is_terminal:
            self.say(f"started   {self._label(job)}" + (f"  (attempt {job.attempts})" if job.attempts > 1 else ""))

    def ended(self, job: Job, folder: Path, jobs: Sequence[Job], running: Running) -> None:
        """On a terminal too, above the table, so that failures are seen at once. jobs: all of the sweep."""
        text = f"{job.status:9} {self._label(job)}  {clock(job.seconds)}"
        if job.status == "finished":
            text += _score(folder)
        if job.error is not None:
            text += f"  {job.error}\n          full log: {folder / LOG}"
        elif not self._console.is_terminal and (left := self._left(jobs, running)):
            text += f"  {left}"
        self.say(text, _STYLES[job.status])

    def update(self, jobs: Sequence[Job], running: Running) -> None:
        """Redraws the table. jobs: all of the sweep."""
        if not self._console.is_terminal:
            return
        title = ", ".join(filter(None, [_counts(jobs), self._left(jobs, running)]))
        headings = [Column(name, justify="right") for name in (*_SHOWN, "time")]
        table = Table("job", *headings, title=title, title_justify="left", title_style="")
        for job in jobs:
            if job.number in running:
                seconds, folder = running[job.number]
                row = last_row(RunFolder(folder).metrics_jsonl)
                values = [(row.get(metric), form) for metric, form in _SHOWN.values()]
                cells = [format(value, form) if isinstance(value, int | float) else "" for value, form in values]
                table.add_row(self._label(job), *cells, clock(seconds))
        self._live.update(table, refresh=True)

    def finish(self, jobs: Sequence[Job], folder: Path) -> None:
        """The last lines: how many ended how, what failed, and what to do next."""
        self.say(f"{_counts(jobs)} of {self._total}; {clock(sum(job.seconds for job in jobs))} of job time in total")
        failed = [job for job in jobs if job.status == "failed"]
        width = max((len(self._label(job)) for job in failed), default=0)
        for job in failed:
            self.say(f"  {self._label(job):{width}}  {job.error}", _STYLES["failed"])
        where = shlex.quote(str(folder))
        if any(job.status != "finished" for job in jobs):
            self.say(f"resume (finished jobs are not run again): hybridlm sweep --resume {where}")
        if any(job.status == "finished" for job in jobs):
            self.say(f"compare: hybridlm report {where}")

    def _left(self, jobs: Sequence[Job], running: Running) -> str:
        """The time left, if it is known and there is some."""
        left = seconds_left(jobs, {number: seconds for number, (seconds, _) in running.items()}, self._slots)
        return f"about {clock(left)} left" if left else ""

    def _label(self, job: Job) -> str:
        return f"{job.number:>{len(str(self._total))}}/{self._total} {job.name}"


def last_row(metrics: Path) -> dict[str, Any]:
    """The newest value of each metric among the last rows of metrics.jsonl; empty if there are none yet."""
    found: dict[str, Any] = {}
    with suppress(OSError, Unreadable), open_regular(metrics) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
        for line in file.read().splitlines():
            with suppress(Unreadable):  # cut off, or being written
                row = parse_json(line)
                found |= row if isinstance(row, dict) else {}
    return found


def _counts(jobs: Sequence[Job]) -> str:
    counts = Counter(str(job.status) for job in jobs)
    return ", ".join(f"{counts[status]} {status}" for status in _STYLES if counts[status])


def _score(folder: Path) -> str:
    summary: object = None
    with suppress(Unreadable):
        summary = read_json(RunFolder(folder).summary)
    score = summary.get("val/bpb") if isinstance(summary, dict) else None
    return f"  {score:.4f} bits per byte" if isinstance(score, int | float) else ""


def seconds_left(jobs: Sequence[Job], running: Mapping[int, float], slots: int) -> float | None:
    """If every job takes as long as those finished so far did on average; None if there are none.

    running: seconds of this attempt, by job number; slots: parallel jobs.
    """
    finished = [job.seconds for job in jobs if job.status == "finished"]
    if not finished:
        return None
    waiting = [job for job in jobs if job.status in ("waiting", "running")]
    left = [max(0.0, fmean(finished) - job.seconds - running.get(job.number, 0.0)) for job in waiting]
    return max(sum(left) / slots, *left, 0.0)
