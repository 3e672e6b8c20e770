"""Units worked on in several processes: whose error counts, what dies with what, and what is said on the way."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from hybridlm.data import progress
from hybridlm.data.preparing import pool
from hybridlm.data.preparing.pool import work_on
from hybridlm.data.progress import ByteProgress
from hybridlm.errors import UserError

posix = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")


@dataclass(frozen=True)
class Piece:
    """A unit that does ``what``."""

    what: str
    size: int = 1_000_000

    def documents(self):
        return iter(())


@dataclass(frozen=True)
class Task:
    """Leaves in ``folder`` a file for every unit that is begun, and one per process."""

    folder: Path

    def __call__(self, number, unit, progress):
        (self.folder / f"process-{os.getpid()}").touch()
        (self.folder / f"unit-{number}").touch()
        what, _, detail = unit.what.partition(":")
        if what == "read":
            for _ in range(10):
                progress(int(detail))
        elif what == "late":
            time.sleep(1.5)
            raise UserError([f"{number} is bad", "so is its end"])
        elif what == "bad":
            raise UserError(f"{number} is bad")
        elif what == "full":
            raise OSError(28, "No space left on device", "there")
        elif what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "youngest killed":
            until(lambda: len(processes(self.folder)) == 2)
            if os.getpid() == max(processes(self.folder)):
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        elif what == "long":
            time.sleep(60)


def begun(folder):
    return {int(path.name.split("-")[1]) for path in folder.glob("unit-*")}


def processes(folder):
    return {int(path.name.split("-")[1]) for path in folder.glob("process-*")}


def alive(pids):
    """A child that nobody has waited for yet is dead all the same."""
    return {
        pid
        for pid in pids
        if Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] != "Z"
    }


@pytest.fixture
def several(monkeypatch):
    """Processes, however little there is to do."""
    monkeypatch.setattr(pool, "_FEW_BYTES", 0)


def work(folder, *whats, workers=2, first=0):
    done = []
    work_on(Task(folder), list(enumerate(map(Piece, whats), first)), workers, done.append)
    return done


def test_what_is_done_adds_up_to_the_sizes_of_the_units(tmp_path, several):
    """Less text than the file has bytes, more of it, and none."""
    done = work(tmp_path, "read:5000", "read:300000", "none", "read:100000", "read:1", first=3)
    assert done[-1] == 5_000_000
    assert done == sorted(done)
    assert begun(tmp_path) == {3, 4, 5, 6, 7}
    assert processes(tmp_path)
    assert os.getpid() not in processes(tmp_path)


@pytest.mark.parametrize(("size", "total"), [(1_000_000, 3_000_000), (0, 30 * 300_000)], ids=["known", "unknown"])
def test_little_work_is_done_in_this_process_in_order(tmp_path, size, total):
    done, units = [], [(number, Piece("read:300000", size)) for number in (2, 0, 1)]
    work_on(Task(tmp_path), units, 2 if size else 1, done.append)
    assert processes(tmp_path) == {os.getpid()}
    assert done == sorted(done)
    assert done[-1] == total


def test_nothing_to_do(tmp_path):
    assert work(tmp_path) == []


def test_the_error_of_the_first_unit_counts_even_if_a_later_one_fails_sooner(tmp_path, several):
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        work(tmp_path, "late", "bad", *["long"] * 30)
    assert caught.value.problems == ["0 is bad", "so is its end"]
    assert time.monotonic() - began < 40
    assert len(begun(tmp_path)) < 8
    assert not alive(processes(tmp_path))


def test_an_os_error_is_raised_unchanged(tmp_path, several):
    with pytest.raises(OSError, match="No space") as caught:
        work(tmp_path, "none", "full", "long")
    assert (caught.value.errno, caught.value.filename) == (28, "there")


@posix
@pytest.mark.parametrize("units", [["youngest killed"] * 2, ["long", "killed", "none"]])
def test_a_process_that_is_killed_is_one_clear_line(tmp_path, several, capfd, units):
    began = time.monotonic()
    with pytest.raises(UserError, match=r"^data: .* process .* run again .* fewer data\.prepare_workers$") as caught:
        work(tmp_path, *units)
    assert len(caught.value.problems) == 1
    assert time.monotonic() - began < 40
    assert not alive(processes(tmp_path))
    assert capfd.readouterr() == ("", "")


def main(folder, *whats):
    """The program of the tests below."""
    pool._FEW_BYTES = 0
    try:
        Path(folder, "ready").touch()
        work(Path(folder), *whats)
    except KeyboardInterrupt:
        print("interrupted")


def started(folder, *whats):
    here = Path(__file__)
    program = (
        f"import sys; sys.path.insert(0, {str(here.parent)!r}); import {here.stem} as test; test.main(*sys.argv[1:])"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", program, str(folder), *whats], start_new_session=True, **pipes)


def until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@posix
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
def test_no_process_outlives_a_parent_that_is_killed(tmp_path):
    with started(tmp_path, "long", "long") as parent:
        until(lambda: len(begun(tmp_path)) == 2)
        pids = processes(tmp_path)
        assert len(alive(pids)) == 2
        parent.kill()
    began = time.monotonic()
    until(lambda: not alive(pids))
    assert time.monotonic() - began < 20


@posix
@pytest.mark.parametrize("when", ["while_processes_start", "while_they_work"])
def test_an_interrupt_of_the_whole_group_ends_it_quickly_and_quietly(tmp_path, when):
    with started(tmp_path, "long", "long", "long") as parent:
        until((tmp_path / "ready").exists)
        if when == "while_they_work":
            until(lambda: len(begun(tmp_path)) == 2)
        else:
            time.sleep(0.15)
        began = time.monotonic()
        os.killpg(parent.pid, signal.SIGINT)
        out, err = parent.communicate(timeout=60)
    assert (out, err) == ("interrupted\n", "")
    assert time.monotonic() - began < 30
    assert not alive(processes(tmp_path))


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(("total", "amount"), [(2_000_000_000, "{} of 2,000 MB"), (0, "{} MB")])
def test_without_a_terminal_progress_is_a_line_every_half_minute(monkeypatch, clock, total, amount):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    lines, done = [], 500_000_000
    with ByteProgress("reading", total, lines.append) as bar:
        bar.update_to(done)  # of an earlier process, and no part of the rate
        for _ in range(260):
            clock[0] += 0.25
            done += 2_500_000
            bar.update_to(done)
    assert lines == [f"reading: {amount.format(done)}, 10.0 MB/s" for done in ("800", "1,100")]
    assert sys.stderr.getvalue() == ""


def test_short_work_reports_nothing(monkeypatch, clock):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    lines = []
    with ByteProgress("reading", 10, lines.append) as bar:
        for done in range(10):
            bar.update_to(done)
            clock[0] += 2.9
    assert lines == []


def test_on_a_terminal_a_bar_appears_after_a_second_and_goes(monkeypatch, clock):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress.Progress, "start", lambda self: started.append(self))
    started, lines = [], []
    with ByteProgress("reading", 4_000_000, lines.append) as bar:
        bar.update_to(0)
        clock[0] += 0.9
        bar.update_to(1_000_000)
        assert not started
        clock[0] += 1.1
        bar.update_to(2_000_000)
        bar.update_to(9_000_000)
        shown = started[0]
        assert (shown.tasks[0].completed, shown.tasks[0].total) == (4_000_000, 4_000_000)
        assert shown.tasks[0].fields["amount"] == "9 of 4 MB, 4.5 MB/s"
    assert lines == []
