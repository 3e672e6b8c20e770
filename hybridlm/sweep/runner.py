"""Runs the jobs of a sweep on one machine: a process per job, as many in parallel as there are slots, until all have
ended or the user stops them.

Each run holds the lock of its folder while it trains, whatever becomes of the runner. On Linux the jobs are told to
stop when their runner dies; elsewhere they continue, and the next runner waits for them.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from hybridlm.config.groups import root
from hybridlm.config.overrides import quoted
from hybridlm.errors import UserError
from hybridlm.files.folders import refuse_links
from hybridlm.files.held import Held, holding
from hybridlm.machine.launcher import dies_with
from hybridlm.runs.run_folder import RunFolder
from hybridlm.sweep.display import Display, Running
from hybridlm.sweep.job import LOG, Job, Sweep

STOPPED = 143  # exit code, like that of a run stopped by SIGTERM
_POLL_SECONDS = 0.2
_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
_ERROR = re.compile(r"(config )?error: .+|([A-Za-z_]\w*\.)*\w*(Error|Exception|Interrupt|Exit)\b.*")
# -P: no module is imported from the working directory that a sweep names.
_PROGRAM = (sys.executable, "-P", "-m", "hybridlm", "train")
_TAIL = 16_384  # bytes of a log that are searched for its last error
Environment = Mapping[str, str]


class JobProcess(subprocess.Popen[bytes]):
    """A running job."""

    def __init__(self, overrides: Sequence[str], folder: Path, environment: Environment, cwd: str) -> None:
        """Starts ``hybridlm train`` in ``cwd``, in a session of its own, with its output in the folder's job.log."""
        folder.mkdir(parents=True, exist_ok=True)
        refuse_links(folder)
        self._log, self._began = folder / LOG, time.monotonic()
        self._offset = self._log.stat().st_size if self._log.exists() else 0
        # A checkout that is not installed has to be found from any folder.
        modules = [str(root())] if (root() / "pyproject.toml").is_file() else []
        modules += [environment["PYTHONPATH"]] if environment.get("PYTHONPATH") else []
        with self._log.open("ab") as log:
            super().__init__(
                [*_PROGRAM, *overrides],
                cwd=cwd,
                env={**environment, "PYTHONPATH": os.pathsep.join(modules), "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=dies_with(os.getpid(), signal.SIGTERM),
            )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def kill(self) -> None:
        """Kills it and, on POSIX, the processes it has started."""
        if os.name != "posix":
            super().kill()
        else:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def last_error(self) -> str:
        """The last line of its output that looks like an error, else the last line, else nothing."""
        with self._log.open("rb") as log:
            log.seek(max(self._offset, self._log.stat().st_size - _TAIL))
            lines = [line.strip() for line in log.read().decode("utf-8", "replace").splitlines() if line.strip()]
        errors = [line for line in lines if _ERROR.fullmatch(line)]
        return (errors or lines or [""])[-1][:300]


class Runner:
    """Runs the jobs of ``sweep`` that are not finished."""

    def __init__(self, sweep: Sweep, slots: Sequence[Environment]) -> None:
        """slots: one per parallel job, with the environment variables it sets."""
        self._sweep, self._free = sweep, list(slots)
        self._jobs: dict[int, Job] = {}
        self._running: dict[int, tuple[JobProcess, Environment]] = {}
        self._signals, self._handled = 0, 0
        self._display = Display(len(sweep.jobs), len(slots))

    def run(self) -> int:
        """The exit code: 0 all jobs are finished, 1 some are not, 143 stopped. UserError: another runner is working on
        the sweep."""
        with self._exclusively(), self._counting_signals(), self._display.shown():
            self._jobs = {job.number: job for job in self._sweep.read()}  # a previous runner may just have ended
            self._settle_abandoned()
            waiting = [job for job in self._jobs.values() if job.status != "finished"]
            while self._running or (waiting and not self._signals):
                while waiting and self._free and not self._signals:
                    self._start(waiting.pop(0))
                self._handle_signals()
                time.sleep(_POLL_SECONDS)
                self._collect()
                self._display.update([*self._jobs.values()], self._progress())
        self._display.finish([*self._jobs.values()], self._sweep.folder)
        if self._signals:
            return STOPPED
        return 0 if all(job.status == "finished" for job in self._jobs.values()) else 1

    def _progress(self) -> Running:
        folder = self._sweep.job_folder
        return {number: (process.seconds, folder(number)) for number, (process, _) in self._running.items()}

    def _settle_abandoned(self) -> None:
        """Records how the jobs ended that a killed runner left as running, after waiting for those still alive."""
        for job in [job for job in self._jobs.values() if job.status == "running"]:
            folder = self._sweep.job_folder(job.number)
            if is_training(folder):
                self._display.say(
                    f"waiting   for job {job.number}, which an earlier runner started and is still running"
                )
            while is_training(folder):
                if self._signals:
                    return
                time.sleep(_POLL_SECONDS)
            self._record(job.abandoned(folder))

    def _start(self, job: Job) -> None:
        folder, slot = self._sweep.job_folder(job.number), self._free.pop(0)
        self._record(job.begun())
        process = JobProcess(_arguments(job, RunFolder(folder)), folder, {**os.environ, **slot}, self._sweep.cwd)
        self._running[job.number] = process, slot
        self._display.started(self._jobs[job.number])

    def _collect(self) -> None:
        for number, (process, slot) in list(self._running.items()):
            if (code := process.poll()) is not None:
                folder = self._sweep.job_folder(number)
                del self._running[number]
                self._free.append(slot)
                stopping = self._signals > 0
                done = self._jobs[number].done(code, folder, process.seconds, process.last_error(), stopping=stopping)
                self._record(done)
                self._display.ended(done, folder, [*self._jobs.values()], self._progress())

    def _handle_signals(self) -> None:
        """The first signal lets the jobs save and exit; the second kills them."""
        if self._signals > self._handled:
            for process, _ in self._running.values():
                process.terminate() if self._handled == 0 else process.kill()
            if self._handled == 0:
                self._display.say(
                    f"stopping  {len(self._running)} running job(s), which save first; again to kill them"
                )
            self._handled = self._signals

    def _record(self, job: Job) -> None:
        self._jobs[job.number] = job
        self._sweep.write(job)

    @contextmanager
    def _counting_signals(self) -> Iterator[None]:
        """Ctrl-C, SIGTERM and the end of the terminal are counted here and handled in the loop."""

        def count(number: int, frame: object) -> None:
            self._signals += 1

        numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
        before = {number: signal.signal(number, count) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        try:
            with holding(self._sweep.folder / "sweep.lock"):
                yield
        except Held:
            raise UserError(f"{self._sweep.folder}: another runner is working on this sweep") from None


def is_training(folder: Path) -> bool:
    """Whether some process trains in a run folder."""
    lock = RunFolder(folder).lock
    try:
        with holding(lock) if lock.exists() else nullcontext():
            return False
    except Held:
        return True


def _arguments(job: Job, folder: RunFolder) -> list[str]:
    """The overrides of the next attempt: the job's own, or only those that resume the run from its checkpoint. An
    attempt that saved nothing starts over."""
    where = f"hydra.run.dir={quoted(folder.path.absolute())}"
    if folder.is_run() and folder.resumable():
        return ["ckpt=auto", where]
    return [*job.overrides, *(["ckpt=auto"] if folder.is_run() else []), where]
