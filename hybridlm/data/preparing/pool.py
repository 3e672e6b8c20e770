"""Work on the units of a corpus in several processes: in order, with progress, and stoppable at once."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any, TypeAlias

from hybridlm.data.reading.documents import Unit
from hybridlm.errors import UserError

_FEW_BYTES = 32_000_000  # are processed in this process: starting others takes a second or two
_POLL = 0.25  # seconds between two looks at the processes

# What is done with a numbered unit, picklable; it passes on bytes of text as they are read.
Work: TypeAlias = Callable[[int, Unit, Callable[[int], None]], object]


def work_on(work: Work, units: Sequence[tuple[int, Unit]], workers: int, update: Callable[[int], None]) -> None:
    """``work`` on every numbered unit. update: gets the sum of the sizes of what is done, again and again.

    The error of the first unit, in their order, that has one is raised, and work on later units is abandoned.
    UserError: a process died.
    """
    workers = min(workers, len(units))
    if workers < 2 or 0 < sum(unit.size for _, unit in units) < _FEW_BYTES:  # 0: unknown
        read = 0

        def advance(size: int) -> None:
            nonlocal read
            read += size
            update(read)

        for number, unit in units:
            _counted(work, number, unit, advance)
        return
    context = multiprocessing.get_context("spawn")  # a fork would share the threads of whatever this process has loaded
    # Read without the lock, which a process that was killed may hold for ever.
    done, stop = context.Value("q", 0), context.RawValue("b", False)
    pool = ProcessPoolExecutor(workers, context, _begin, (work, done, stop))
    finished = False
    try:
        with _no_interrupt():
            futures = [pool.submit(_do, number, unit) for number, unit in units]
            # The executor looks for dead processes among those of its last call but one.
            pool.submit(int)
        for future in futures:
            while wait([future], _POLL).not_done:
                update(done.get_obj().value)
            future.result()
        finished = True
    except BrokenProcessPool as error:
        raise UserError(
            "data: a tokenising process was killed, possibly for lack of memory; run again (finished files are kept)"
            " with fewer data.prepare_workers"
        ) from error
    finally:
        stop.value = not finished
        pool.shutdown(wait=True, cancel_futures=True)
    update(done.get_obj().value)


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


def _counted(work: Work, number: int, unit: Unit, advance: Callable[[int], None]) -> None:
    """Makes the bytes of text that are read of a unit add up to its size, which is that of the file's bytes."""
    left = unit.size

    def progress(text: int) -> None:
        nonlocal left
        step = min(text, left) if unit.size else text
        left -= step
        advance(step)

    work(number, unit, progress)
    if unit.size:
        advance(left)


_state: tuple[Work, Any, Any]  # of a worker process


def _begin(work: Work, done: Any, stop: Any) -> None:
    global _state
    # Each process has one core; and it must not outlive its parent, however that ends.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_in_time, args=(stop,), daemon=True).start()
    _state = work, done, stop


def _end_in_time(stop: Any) -> None:
    """Ends this process, in the middle of a unit, when its parent has ended or asks it to stop."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    while not stop.value and not connection.wait([parent.sentinel], _POLL):
        pass
    os._exit(1)


def _do(number: int, unit: Unit) -> None:
    work, done, stop = _state
    if stop.value:
        return

    def advance(size: int) -> None:
        with done.get_lock():
            done.value += size

    _counted(work, number, unit, advance)
