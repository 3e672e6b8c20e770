"""Batches prefetched by worker processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from multiprocessing import connection
from typing import Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from hybridlm.errors import RunFailed

_T = TypeVar("_T")
_PREFETCH = 4  # batches per worker
_POLL = 0.25  # seconds between two checks of the trainer


class Ahead(Generic[_T]):
    """``make(first)``, ``make(first + 1)``, ... without end, in order, whichever worker computes them.

    The workers end with ``close``, with this object, or with the process that made it.
    """

    def __init__(self, make: Callable[[int], _T], first: int, workers: int, context: str | None) -> None:
        """make: picklable if ``context`` is "spawn"; context: how processes start, None: the system's default."""
        self.next = first  # the index of what ``take`` returns next
        # Then the workers are not this process's children.
        served = (context or multiprocessing.get_start_method()) == "forkserver"
        loader = DataLoader(
            _Made(make),
            batch_size=None,
            sampler=_From(first),
            num_workers=workers,
            prefetch_factor=_PREFETCH,
            worker_init_fn=partial(_begin, None if served else os.getpid()),
            multiprocessing_context=context,
            generator=torch.Generator(),  # otherwise it draws from the global one, and workers change the run
        )
        self._batches = iter(loader)
        # Lightning calls it too: torch has no public name for it except the iterator's destructor, which runs late if a
        # traceback still holds it. As a finalizer it also runs before multiprocessing signals its children, which torch
        # would complain about.
        self._end = weakref.finalize(self, self._batches._shutdown_workers)  # type: ignore[attr-defined]

    def take(self) -> _T:
        """RunFailed: a token file has changed."""
        batch: _T | RunFailed = next(self._batches)
        if isinstance(batch, RunFailed):
            raise batch
        self.next += 1
        return batch

    def close(self) -> None:
        """Ends the workers now."""
        self._end()


class _Made(Dataset[_T | RunFailed]):
    def __init__(self, make: Callable[[int], _T]) -> None:
        self._make = make

    def __getitem__(self, index: int) -> _T | RunFailed:
        try:
            return self._make(index)
        except RunFailed as error:  # returned: torch would re-raise it with this process's traceback in its message
            return error


class _From(Sampler[int]):
    def __init__(self, first: int) -> None:
        self._first = first

    def __iter__(self) -> Iterator[int]:
        return count(self._first)


def _begin(trainer: int | None, worker: int) -> None:
    """A worker ends when the trainer ends it or is gone, and runs none of the handlers it inherits. Ctrl-C and a
    scheduler's signal reach the whole process group: handling them is up to the trainer.

    trainer: the expected parent of this process; None if the parent is another process.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):  # Windows has only the first
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if trainer is not None and os.getppid() != trainer:
        os._exit(0)  # it is gone already: torch, which waits for its parent to change, would wait for ever
    threading.Thread(target=_end_with, args=(trainer,), daemon=True).start()


def _end_with(trainer: int | None) -> None:
    """Ends this process when the trainer was killed. torch checks for that too, but only every five seconds."""
    parent = multiprocessing.parent_process()
    # Useless among forks, which hold each other's ends of the pipe.
    watched = [] if parent is None else [parent.sentinel]
    while (trainer is None or os.getppid() == trainer) and not connection.wait(watched, _POLL):
        pass
    os._exit(0)
