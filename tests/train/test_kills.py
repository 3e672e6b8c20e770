"""Runs that are killed again and again at random moments and resumed until they are done, against one that was left alone.

Most processes are forked from this one, whose imports are done: a kill then costs a second instead of ten. ``-s`` shows the counts.
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
from run_ends import assert_same_end, second_rank

from hybridlm.compose import compose_config
from hybridlm.config.run import RunConfig
from hybridlm.errors import RunFailed, UserError
from hybridlm.run_folder import RunFolder, step_of
from hybridlm.train import checkpoint_io
from hybridlm.train.run import run

pytestmark = pytest.mark.slow
TRAIN = Path(__file__).parents[2] / "train.py"
STEPS = 24
SETTINGS = [f"trainer.max_steps={STEPS}", "trainer.accumulate=2", "trainer.ckpt_every=3", "trainer.log_every=1", "trainer.val_every=4"]
KINDS = ["SIGKILL", "in a write", "in a write", "SIGTERM", "SIGUSR1", "SIGINT", "disk full"]
# What a process may end with: killed, stopped after saving, Lightning's exit after Ctrl-C or a last checkpoint that found no room, done.
ENDINGS = {-signal.SIGKILL, -signal.SIGTERM, -signal.SIGUSR1, 143, 1, 0}


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

    checkpoint_io._Hashed.write = deadly(checkpoint_io._Hashed.write)  # type: ignore[method-assign]
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
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
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
            found = [step_of(folder.newest_checkpoint())] if folder.step_checkpoints() else []  # raises where none can be trusted
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


def test_two_ranks_are_killed_too(tiny, tmp_path, environment):
    """Through the command line; whichever rank dies, the run goes on exactly, and no process stays behind."""
    settings = [*tiny, *SETTINGS, "trainer.devices=2", "optim=adamw", "optim.schedule=constant"]
    dice, log = random.Random(2), (tmp_path / "log").open("ab")

    def life(name: str, number: signal.Signals | None, second: bool = False) -> int:
        command = [sys.executable, str(TRAIN), *settings, "ckpt=auto", f"hydra.run.dir={name}"]
        folder = RunFolder(tmp_path / name)
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            before = len(folder.step_checkpoints())
            seen = [path.stat().st_mtime_ns for path in folder.step_checkpoints()]
            while number is not None and process.poll() is None:
                now = [path.stat().st_mtime_ns for path in folder.step_checkpoints()]
                if len(now) > before or now != seen:
                    break
                time.sleep(0.01)
            time.sleep(dice.uniform(0, 0.1))
            if number is not None and process.poll() is None:
                os.kill(second_rank(process.pid) if second else process.pid, number)
            return process.wait(timeout=600)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    assert life("whole", None) == 0, (tmp_path / "log").read_text()[-3000:]
    broken = RunFolder(tmp_path / "broken")
    kills = 0
    for number, second in [(signal.SIGTERM, True), (signal.SIGKILL, False), (signal.SIGKILL, True), (signal.SIGTERM, False)]:
        code = life("broken", number, second)
        assert code != 2, (tmp_path / "log").read_text()[-3000:]
        kills += code != 0
        try:
            broken.newest_checkpoint()
        except UserError:
            pytest.fail(f"no checkpoint after {number.name}")
        if code == 0:
            break
    if not broken.summary.exists():
        assert life("broken", None) == 0, (tmp_path / "log").read_text()[-3000:]
    assert_same_end(broken, RunFolder(tmp_path / "whole"), STEPS)
    print(f"\n{kills} kills of 2 ranks: 0 mismatches, 0 lost checkpoints")
