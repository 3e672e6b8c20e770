"""Processes that were started together: one decides, all begin or none does. Each is a thread here; ``kill`` takes its
heartbeat away."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from hybridlm.cli import rendezvous
from hybridlm.cli.rendezvous import Decision, Rendezvous
from hybridlm.errors import RunFailed, UserError
from hybridlm.machine.launcher import launch

DECISION = Decision("run", "step-00000004.ckpt", "here")


@pytest.fixture
def launched(monkeypatch):
    """The place of one of three processes of a launch."""

    def of(rank: int):
        for name, value in {
            "TORCHELASTIC_RUN_ID": "abc",
            "WORLD_SIZE": "3",
            "LOCAL_WORLD_SIZE": "3",
            "RANK": rank,
            "LOCAL_RANK": rank,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29500",
        }.items():
            monkeypatch.setenv(name, str(value))
        return launch()

    monkeypatch.setattr(rendezvous, "_HEARTBEAT", 0.05)
    monkeypatch.setattr(rendezvous, "_FAREWELL", 2.0)
    return of


def together(launched, place, *parts):
    """What the part of each process returns or raises, and the seconds until all have ended."""
    meetings = [Rendezvous(launched(rank), place) for rank in range(len(parts))]

    def played(rank: int):
        try:
            with meetings[rank] as mine:
                return parts[rank](mine)
        except Exception as error:
            return error

    began = time.monotonic()
    with ThreadPoolExecutor(len(parts)) as pool:
        results = list(pool.map(played, range(len(parts))))
    return results, time.monotonic() - began


def first(mine):
    time.sleep(0.3)  # it decides later than the others ask
    mine.decide(DECISION)
    mine.meet()
    end = time.monotonic() + 5
    while mine._folder.exists():  # while it trains: a run that is killed leaves none
        assert time.monotonic() < end
        time.sleep(0.01)
    return "trained"


def other(mine):
    decision = mine.decision()
    if decision is None:
        return "nothing to do"
    mine.meet()
    return decision


def test_all_begin_with_the_word_of_the_first(launched, tmp_path):
    results, _ = together(launched, tmp_path / "run", first, other, other)
    assert results == ["trained", DECISION, DECISION]
    assert list(tmp_path.iterdir()) == [], "its files are gone, and the folder, which nobody took"


def test_nothing_to_do(launched, tmp_path):
    results, _ = together(launched, tmp_path / "run", lambda mine: mine.decide(None), other, other)
    assert results == [None, "nothing to do", "nothing to do"]


def test_where_one_is_refused_none_waits(launched, tmp_path):
    def refused(mine):
        raise UserError("data.path: nothing there")

    results, seconds = together(launched, tmp_path / "run", refused, other, other)
    assert [str(result) for result in results[1:]] == [
        f"process {rank} ends with process 0 (data.path: nothing there)" for rank in (1, 2)
    ]

    def refused_later(mine):
        mine.decision()
        raise UserError("no memory here")

    results, more = together(launched, tmp_path / "run", first, other, refused_later)
    assert all(isinstance(result, UserError) and "no memory here" in str(result) for result in results)
    assert seconds + more < 10
    assert list(tmp_path.iterdir()) == []


def test_one_that_is_killed_is_missed(launched, tmp_path, monkeypatch):
    monkeypatch.setattr(rendezvous, "_SILENCE", 0.5)
    monkeypatch.setattr(rendezvous, "_FAREWELL", 0.1)
    ended = threading.Event()

    def killed(mine):
        mine._ended.set()
        ended.wait(20)

    def missed(mine):
        try:
            return other(mine)
        finally:
            ended.set()

    results, seconds = together(launched, tmp_path / "run", killed, missed, missed)
    assert all(isinstance(result, RunFailed) and "process 0 of 3" in str(result) for result in results[1:])
    assert seconds < 10
