"""Runs that are killed again and again at random moments and resumed until they are done, against one that was left
alone.

Most processes are forked from this one, whose imports are done: a kill then costs a second instead of ten. ``-s`` shows
the counts.
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
from run_ends import assert_same_end, session

from hybridlm.cli.compose import compose_config
from hybridlm.config.run import RunConfig
from hybridlm.errors import RunFailed
from hybridlm.runs.run_folder import RunFolder, step_of
from hybridlm.train import checkpoints
from hybridlm.train.run import run

pytestmark = pytest.mark.slow
TRAIN = Path(__file__).parents[2] / "train.py"
STEPS = 24
SETTINGS = [
    f"trainer.max_steps={STEPS}",
    "trainer.accumulate=2",
    "trainer.ckpt_every=3",
    "trainer.log_every=1",
    "trainer.val_every=4",
]
KINDS = ["SIGKILL", "in a write", "in a write", "SIGTERM", "SIGUSR1", "SIGINT", "disk full"]
# What a process may end with: killed, stopped after saving, interrupted before training or without room for the last
# checkpoint, done.
ENDINGS = {-signal.SIGKILL, -signal.SIGTERM, -signal.SIGUSR1, -signal.SIGINT, 143, 130, 1, 0}


def die_in_a_write(left: int) -> None:
    """Ends this process without a word at one of the next calls that touch the disk for a checkpoint."""
    counter = [left]

    def deadly(function):
        def counted(*arguments):
            counter[0] -= 1
            if counter[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return counted

    checkpoints._Hashed.write = deadly(checkpoints._Hashed.write)  # type: ignore[method-assign]
    os.replace, os.fsync, os.link = deadly(os.replace), deadly(os.fsync), deadly(os.link)


def fill_the_disk(room: int) -> None:
    """No file grows beyond ``room`` bytes in this process."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))


def forked(config: RunConfig, folder: RunFolder, log: Path, prepare=lambda: None) -> int:
    """Starts or resumes the run in a process of its own; its number."""
    if (process := os.fork()) != 0:
        return process
    code = 3
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)  # else it grows into the limit of "disk full"
        os.dup2(output, 1)
        os.dup2(output, 2)
        prepare()
        run(config, folder, folder.newest_checkpoint() if folder.step_checkpoints() else None)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        print(f"exit: {end.code}", flush=True)
    except (KeyboardInterrupt, RunFailed):
        code = 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def waited(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def begun(folder: RunFolder) -> bool:
    """A run that was killed before its first checkpoint begins anew, in an empty folder."""
    if folder.is_run() and not folder.step_checkpoints():
        for path in sorted(folder.path.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    return folder.is_run()


@pytest.mark.parametrize(
    ("kills", "extra"),
    [
        (40, ["optim=muon"]),
        (15, ["optim=adamw", "data.workers=2"]),
        (15, ["optim=adamw", "callbacks=ema"]),
        (15, ["optim=adamw", "callbacks=ema", "trainer.async_checkpoints=true"]),
    ],
)
def test_no_kill_changes_or_loses_anything(tiny, tmp_path, kills, extra):
    dice, log = random.Random(len(extra) * 1000 + kills), tmp_path / "log"
    config = compose_config([*tiny, *SETTINGS, *extra])
    whole = RunFolder(tmp_path / "whole")
    began = time.monotonic()
    assert waited(forked(config, whole, log)) == 0, log.read_text()[-3000:]
    span = time.monotonic() - began
    counts: collections.Counter[str] = collections.Counter()
    finished = 0
    while counts.total() < kills:
        folder = RunFolder(tmp_path / f"broken-{finished}")
        newest = -1
        while not folder.summary.exists():
            begun(folder)
            kind = dice.choice(KINDS) if counts.total() < kills else "none"
            code = one_life(kind, config, folder, log, dice, span)
            assert code in ENDINGS, f"{kind}: {code}\n{log.read_text()[-3000:]}"
            if code != 0:
                counts[kind] += 1
            found = (
                [step_of(folder.newest_checkpoint())] if folder.step_checkpoints() else []
            )  # raises where none can be trusted
            assert newest < 0 or found, f"{kind}: lost step {newest}"
            assert not found or found[0] >= newest, f"{kind}: back from step {newest} to {found[0]}"
            newest = found[0] if found else newest
        assert_same_end(folder, whole, STEPS)
        assert not list(folder.path.glob("**/.*.partial"))
        finished += 1
    print(f"\n{counts.total()} kills {dict(counts)} of {finished} runs: 0 mismatches, 0 lost checkpoints")


def one_life(kind: str, config: RunConfig, folder: RunFolder, log: Path, dice: random.Random, span: float) -> int:
    """The exit code of a process that is ended in the way of ``kind``, if it is not done before."""
    if kind == "in a write":
        count = dice.randrange(1, 250)
        return waited(forked(config, folder, log, lambda: die_in_a_write(count)))
    if kind == "disk full":
        room = dice.randrange(60_000, 250_000)
        process = forked(config, folder, log, lambda: fill_the_disk(room))
    else:
        process = forked(config, folder, log)
    time.sleep(dice.uniform(0, span))
    if kind in signal.Signals.__members__:
        os.kill(process, signal.Signals[kind])
    return waited(process)


KILLS = int(os.environ.get("HYBRIDLM_KILLS", "60"))  # of the test below
MOMENTS = ["first second", "start", "step", "step"]
VICTIMS = ["all", "first", "second"]


class Lives:
    """Runs through the command line in sessions of their own, which are killed and gone on with."""

    def __init__(self, folder: Path, settings: list[str], environment: dict[str, str], dice: random.Random) -> None:
        self._folder, self._settings, self._environment, self._dice = folder, settings, environment, dice
        self.log = folder / "log"
        self.orphans = 0

    def whole(self, name: str) -> RunFolder:
        """A life that is left alone, to its end."""
        process = self._started(name)
        assert process.wait(timeout=600) == 0, self.log.read_text()[-5000:]
        assert not self._left(process)
        return RunFolder(self._folder / name)

    def killed(self, name: str, victim: str, moment: str, span: float) -> int:
        """The exit code of the first process of a life that is cut short, if it is not done before."""
        process = self._started(name)
        if moment == "step":
            rows, enough = RunFolder(self._folder / name).metrics_jsonl, self._dice.randrange(STEPS)
            began = time.time()
            while process.poll() is None and not (recent(rows, began) and rows.read_text().count("\n") > enough):
                time.sleep(0.005)
            time.sleep(self._dice.uniform(0, 0.1))
        else:
            time.sleep(self._dice.uniform(0, 1 if moment == "first second" else span))
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                if victim == "all":
                    os.killpg(process.pid, signal.SIGKILL)
                else:
                    others = session(process.pid) - {process.pid}
                    os.kill(min(others) if victim == "second" and others else process.pid, signal.SIGKILL)
        code = process.wait(timeout=60)
        self.orphans += len(self._left(process))
        return code

    def _started(self, name: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(TRAIN), *self._settings, "ckpt=auto", f"hydra.run.dir={name}"]
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command,
                cwd=self._folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _left(self, process: subprocess.Popen[bytes]) -> set[int]:
        """What lives three seconds after the first process has ended; it is ended now."""
        deadline = time.monotonic() + 3
        while (left := session(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.05)
        for each in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        return left


def recent(path: Path, since: float) -> bool:
    return path.exists() and path.stat().st_mtime >= since


@pytest.mark.parametrize("ranks", [1, 2])
def test_wherever_a_run_is_killed_it_goes_on_and_leaves_no_process(tiny, tmp_path, environment, ranks):
    """By SIGKILL to all of its processes or to one, at any moment, also in its first second and before its first
    checkpoint."""
    dice = random.Random(ranks)
    settings = [
        *tiny,
        *SETTINGS,
        f"trainer.devices={ranks}",
        "optim=adamw",
        "optim.schedule=constant",
        "optim.warmup=0",
    ]
    lives = Lives(tmp_path, settings, environment, dice)
    lives.whole("first")  # prepares the data
    began = time.monotonic()
    whole = lives.whole("whole")
    span = time.monotonic() - began
    counts: collections.Counter[str] = collections.Counter()
    runs = 0
    while counts.total() < KILLS // 2:
        name, runs = f"broken-{runs}", runs + 1
        for _ in range(dice.randrange(1, 5)):
            moment, victim = dice.choice(MOMENTS), dice.choice(VICTIMS[: 1 + ranks])
            code = lives.killed(name, victim, moment, span)
            assert code in (-signal.SIGKILL, 1, 0), f"{code} after {moment}, {victim}\n{lives.log.read_text()[-5000:]}"
            if code == 0:
                break
            counts[f"{victim} in {moment}"] += 1
        assert_same_end(lives.whole(name), whole, STEPS)
    assert lives.orphans == 0
    print(
        f"\n{counts.total()} kills of {ranks} rank(s) {dict(counts)} in {runs} runs: 0 mismatches, 0 that cannot go on,"
        " 0 orphans"
    )
