"""Work on the units of a corpus in several processes: in order, counted, and stopped at once."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any, Protocol

from hybridlm.data.reading.units import Unit
from hybridlm.errors import UserError

_FEW_BYTES = 32_000_000  # in this process: starting others takes a second or two
_COUNTED = 1 << 18  # bytes between two looks at the shared count
_LOOK = 0.25  # seconds between two looks at the processes
_NOTHING = -1  # no unit is wanted any more, not even those under way


class Work(Protocol):
    """What is done with a unit; can be pickled. It is made once per process by ``begin``."""

    def begin(self) -> None:
        """Read what is needed for all units."""

    def do(self, number: int, unit: Unit, progress: Callable[[int], None]) -> None:
        """ConfigError and OSError reach the caller."""


def work_on(work: Work, units: Sequence[tuple[int, Unit]], workers: int, update: Callable[[int], None]) -> None:
    """``work`` on every numbered unit. update: gets the sum of the sizes of what is done, again and again.

    The error of the first unit, in their order, that has one is raised, and what was under way behind it is left
    unfinished. ConfigError: a process died.
    """
    workers = min(workers, len(units))
    if workers < 2 or 0 < sum(unit.size for _, unit in units) < _FEW_BYTES:  # 0: nobody knows
        _here(work, units, update)
        return
    context = multiprocessing.get_context("spawn")  # a fork would share the threads of whatever this process has loaded
    # Read without the lock, which a process that was killed may hold for ever.
    done, last = context.Value("q", 0), context.RawValue("q", len(units))
    pool = ProcessPoolExecutor(workers, context, _begin, (work, done, last))
    futures: list[Future[None]] = []
    try:
        with _no_interrupt():
            for place, (number, unit) in enumerate(units):
                futures.append(pool.submit(_do, place, number, unit))
            # The executor looks for dead processes among those of its last call but one.
            pool.submit(_nothing)
        error = _first_error(futures, last, lambda: update(done.get_obj().value))
    except BrokenProcessPool as broken:
        error = broken
    finally:
        if not all(future.done() for future in futures):
            last.value = _NOTHING
        pool.shutdown(wait=True, cancel_futures=True)
    if isinstance(error, BrokenProcessPool):
        raise UserError(
            "data: a process that tokenises was ended from outside, maybe for want of memory; run again (finished files"
            " are kept) with fewer data.prepare_workers"
        ) from error
    if error is not None:
        raise error
    update(done.get_obj().value)


def _first_error(futures: Sequence[Future[None]], last: Any, look: Callable[[], None]) -> BaseException | None:
    """The error of the first one that has one, once all before it have come to their end; those behind it shall not
    begin."""
    end = len(futures)
    while wait(futures[:end], _LOOK, FIRST_EXCEPTION).not_done:
        end = next(
            (place for place, future in enumerate(futures[:end]) if future.done() and future.exception() is not None),
            end,
        )
        last.value = end
        look()
    return next((error for future in futures[: end + 1] if (error := future.exception()) is not None), None)


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """Around the start of processes: they inherit that Ctrl-C is not for them, and this process gets it a moment
    later."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _here(work: Work, units: Sequence[tuple[int, Unit]], update: Callable[[int], None]) -> None:
    work.begin()
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        update(done)

    for number, unit in units:
        counter = _Counter(unit.size, advance)
        work.do(number, unit, counter.add)
        counter.finish()


class _Counter:
    """Makes the bytes of text that are read of a unit add up to its size, which is that of the file's bytes."""

    def __init__(self, size: int, advance: Callable[[int], None]) -> None:
        self._size, self._advance = size, advance
        self._said = self._held = 0

    def add(self, text: int) -> None:
        self._held += text
        if self._held >= _COUNTED:
            self._say(self._held if not self._size else min(self._held, self._size - self._said))

    def finish(self) -> None:
        self._say(self._size - self._said if self._size else self._held)

    def _say(self, bytes_done: int) -> None:
        self._advance(bytes_done)
        self._said, self._held = self._said + bytes_done, 0


_state: tuple[Work, Any, Any]  # of a worker process
_begun = False


def _begin(work: Work, done: Any, last: Any) -> None:
    global _state
    # Each process has one core; and it must not outlive its parent, whatever ends that.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_in_time, args=(last,), daemon=True).start()
    _state = work, done, last


def _end_in_time(last: Any) -> None:
    """Ends this process, in the middle of a unit, when its parent has ended or wants no more of it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    while last.value != _NOTHING and not connection.wait([parent.sentinel], _LOOK):
        pass
    os._exit(1)


def _nothing() -> None:
    pass


def _do(place: int, number: int, unit: Unit) -> None:
    global _begun
    work, done, last = _state
    if place > last.value:
        return
    if not _begun:  # not in _begin, whose errors do not reach the parent
        work.begin()
        _begun = True

    def advance(size: int) -> None:
        with done.get_lock():
            done.value += size

    counter = _Counter(unit.size, advance)
    work.do(number, unit, counter.add)
    counter.finish()
