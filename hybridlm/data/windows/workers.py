"""Batches made ahead of training by worker processes."""

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
_PREFETCH = 4  # batches a worker
_LOOK = 0.25  # seconds between two looks at the trainer


class Ahead(Generic[_T]):
    """``make(first)``, ``make(first + 1)``, ... without end, in order, whichever worker makes them.

    The workers end with ``close``, with this object, or with the process that made it.
    """

    def __init__(self, make: Callable[[int], _T], first: int, workers: int, context: str | None) -> None:
        """make: can be sent to another process where ``context`` is "spawn"; context: how processes start, None: as the
        system likes."""
        self.next = first  # the index of what ``take`` returns next
        served = (
            context or multiprocessing.get_start_method()
        ) == "forkserver"  # then the workers are not this process's children
        loader = DataLoader(
            _Made(make),
            batch_size=None,
            sampler=_From(first),
            num_workers=workers,
            prefetch_factor=_PREFETCH,
            worker_init_fn=partial(_begin, None if served else os.getpid()),
            multiprocessing_context=context,
            generator=torch.Generator(),  # else it draws from the global one, and a run with workers is another run
        )
        self._batches = iter(loader)
        # What Lightning calls too: torch has no public name for it but the iterator's own end, which comes late where a
        # traceback still holds it. As a finalizer it also runs before multiprocessing ends its children by a signal, of
        # which torch would complain.
        self._end = weakref.finalize(self, self._batches._shutdown_workers)  # type: ignore[attr-defined]

    def take(self) -> _T:
        """RunFailed: a file is not what it was."""
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
        except RunFailed as error:  # as a result: torch would raise it again with this process's traceback in its text
            return error


class _From(Sampler[int]):
    def __init__(self, first: int) -> None:
        self._first = first

    def __iter__(self) -> Iterator[int]:
        return count(self._first)


def _begin(trainer: int | None, worker: int) -> None:
    """A worker ends when the trainer ends it or has gone, and runs none of the handlers that it inherits. Ctrl-C and a
    scheduler's notice reach the whole group of processes: they are the trainer's to act upon.

    trainer: the process that this one has to be a child of; None where that is another.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):  # Windows has only the first
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if trainer is not None and os.getppid() != trainer:
        os._exit(
            0
        )  # it has gone already: torch, which looks for another parent than the first it sees, would wait for ever
    threading.Thread(target=_end_with, args=(trainer,), daemon=True).start()


def _end_with(trainer: int | None) -> None:
    """Ends this process when the trainer was killed. torch looks after it, too, but only every five seconds."""
    parent = multiprocessing.parent_process()
    watched = (
        [] if parent is None else [parent.sentinel]
    )  # tells nothing among forks, which hold each other's ends of the pipe
    while (trainer is None or os.getppid() == trainer) and not connection.wait(watched, _LOOK):
        pass
    os._exit(0)
