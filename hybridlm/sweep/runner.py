"""The loop of a sweep on one machine: a process per job, as many at once as there are slots, until all have ended or
someone stops it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from hybridlm.config.overrides import quoted
from hybridlm.errors import UserError
from hybridlm.runs.run_folder import RunFolder
from hybridlm.sweep.estimate import Work
from hybridlm.sweep.job import LOCK, Job, Sweep
from hybridlm.sweep.process import BUSY, JobProcess, hold, is_held
from hybridlm.sweep.show import Show

STOPPED = 143  # exit code, as of a run that SIGTERM has ended
_LOOK_EVERY = 0.2  # seconds
_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
Environment = Mapping[str, str]


class Runner:
    """Runs the jobs of ``sweep`` that are not finished."""

    def __init__(self, sweep: Sweep, slots: Sequence[Environment], work: Mapping[int, Work]) -> None:
        """slots: as many jobs as run at once, each with the variables that its slot sets; work: of the jobs that are
        not finished."""
        self._sweep, self._free = sweep, list(slots)
        self._jobs: dict[int, Job] = {}
        self._running: dict[int, tuple[JobProcess, Environment]] = {}
        self._asked = 0  # how often someone asked to stop
        self._heeded = 0
        self._show = Show(len(sweep.jobs), work, len(slots))

    def run(self) -> int:
        """The exit code: 0 all jobs are finished, 1 some are not, 143 stopped. ConfigError: another runner is at work
        in the folder."""
        with _alone(self._sweep.folder), self._listening(), self._show:
            self._jobs = {
                job.number: job for job in self._sweep.read()
            }  # only now: a runner before this one may have ended just so
            self._settle(self._await_others())
            waiting = [job.number for job in self._jobs.values() if job.status != "finished"]
            while self._running or (waiting and not self._asked):
                while waiting and self._free and not self._asked:
                    self._start(self._jobs[waiting.pop(0)])
                self._heed()
                time.sleep(_LOOK_EVERY)
                self._collect()
                self._show.tick(list(self._jobs.values()), self._places())
        jobs = list(self._jobs.values())
        self._show.finish(jobs, self._sweep.folder)
        if self._asked:
            return STOPPED
        return 0 if all(job.status == "finished" for job in jobs) else 1

    def _places(self) -> dict[int, tuple[float, Path]]:
        """Of the jobs that run: seconds so far, and folder."""
        return {
            number: (process.seconds, self._sweep.job_folder(number)) for number, (process, _) in self._running.items()
        }

    def _await_others(self) -> list[Job]:
        """Waits until no job of a runner that was killed is alive; the jobs that such a runner left as running."""
        left = [job for job in self._jobs.values() if job.status == "running"]
        for job in left:
            lock, said = self._sweep.job_folder(job.number) / LOCK, False
            while is_held(lock) and not self._asked:
                if not said:
                    self._show.say(f"waiting   for job {job.number}, which another runner started and which still runs")
                said = True
                time.sleep(_LOOK_EVERY)
        return [job for job in left if not is_held(self._sweep.job_folder(job.number) / LOCK)]

    def _settle(self, left: Sequence[Job]) -> None:
        for job in left:
            self._keep(job.abandoned(self._sweep.job_folder(job.number)))

    def _start(self, job: Job) -> None:
        folder, slot = self._sweep.job_folder(job.number), self._free.pop(0)
        self._keep(job.begun())
        arguments = _arguments(job, RunFolder(folder))
        process = JobProcess(arguments, folder, {**os.environ, **slot, "PYTHONUNBUFFERED": "1"}, self._sweep.cwd)
        self._running[job.number] = process, slot
        self._show.began(self._jobs[job.number])

    def _collect(self) -> None:
        for number, (process, slot) in list(self._running.items()):
            if (code := process.poll()) is not None:
                folder = self._sweep.job_folder(number)
                del self._running[number]
                self._free.append(slot)
                done = self._jobs[number].done(
                    code, folder, process.seconds, process.last_error(), asked=self._asked > 0
                )
                self._keep(done)
                self._show.ended(done, folder, list(self._jobs.values()), self._places())

    def _heed(self) -> None:
        """Passes on what was asked since the last look."""
        if self._asked > self._heeded:
            for process, _ in self._running.values():
                process.stop() if self._heeded == 0 else process.kill()
            if self._heeded == 0:
                self._show.say(
                    f"stopping  {len(self._running)} running job(s) save their state and end; once more kills them"
                )
            self._heeded = self._asked

    def _keep(self, job: Job) -> None:
        self._jobs[job.number] = job
        self._sweep.write(job)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Ctrl-C, SIGTERM and the end of the terminal are counted, and heeded in the loop."""

        def count(number: int, frame: object) -> None:
            self._asked += 1

        names = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
        before = [signal.signal(number, count) for number in names]
        try:
            yield
        finally:
            for number, handler in zip(names, before, strict=True):
                signal.signal(number, handler)


def _arguments(job: Job, folder: RunFolder) -> list[str]:
    """The overrides of this attempt: the job's own, or those that the run has recorded where it goes on from a
    checkpoint."""
    where = f"hydra.run.dir={quoted(folder.path.absolute())}"
    if folder.is_run() and folder.resumable():
        return ["ckpt=auto", where]
    return [
        *job.overrides,
        *(["ckpt=auto"] if folder.is_run() else []),
        where,
    ]  # an attempt that had saved nothing is begun anew


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While this runner has the folder to itself. ConfigError: another one is at work there."""
    lock = hold(folder / "sweep.lock")
    if lock == BUSY:
        raise UserError(f"{folder}: another runner is at work on this sweep")
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)
