"""Work that goes on beside the training loop, and copies of what it needs that training does not change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from torch import Tensor

from hybridlm.machine.device import CPU

T = TypeVar("T")


class Background:
    """Does one thing at a time, in the order they come: in a thread, or at once where ``threaded`` is false."""

    def __init__(self, *, threaded: bool) -> None:
        self.threaded = threaded
        self._thread: ThreadPoolExecutor | None = None
        self._last: Future[Any] | None = None

    def start(self, work: Callable[[], T]) -> Future[T]:
        """What ``work`` will return. It is not done if what was started before it raised: that is then raised in its
        place."""
        if not self.threaded:
            done: Future[T] = Future()
            done.set_result(work())
            return done
        before = self._last

        def in_turn() -> T:
            if before is not None:
                before.result()
            return work()

        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self._last = future = self._thread.submit(in_turn)
        return future

    def wait(self) -> None:
        """Returns when there is nothing left to do, however it went."""
        if self._last is not None:
            self._last.exception()

    def close(self) -> None:
        """Waits and ends the thread; another ``start`` begins a new one."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
        self._thread = self._last = None


def snapshot(value: Any) -> Any:
    """The content of a checkpoint as it is now: containers of the same types, every tensor a copy in the memory of the
    CPU."""
    if isinstance(value, Tensor):
        return value.detach().to(CPU, copy=True)
    if isinstance(value, dict):
        copied = copy.copy(value)  # with what torch hangs on a state dict
        for key, item in value.items():
            copied[key] = snapshot(item)
        return copied
    if isinstance(value, list | tuple):
        return type(value)(snapshot(item) for item in value)
    return copy.deepcopy(value)
