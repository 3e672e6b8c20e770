"""How far a long look at a corpus has come: a bar on a terminal, else a line every half minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_EVERY = 30.0  # seconds between lines
_AFTER = 1.0  # seconds before a bar appears: short work needs none


class ByteProgress:
    """``update`` with the bytes that are done so far; the rate is over the time since it began."""

    def __init__(self, what: str, total: int, report: Callable[[str], None]) -> None:
        """total: bytes, 0 if unknown; report: for the lines where there is no terminal."""
        self._what, self._total, self._report = what, total, report
        self._began = self._said = time.monotonic()
        self._first: int | None = None
        self._bar: Progress | None = None
        self._terminal = sys.stderr.isatty()

    def __enter__(self) -> ByteProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int) -> None:
        """``done`` bytes of text are behind us, those of an earlier process included in the first call."""
        now = time.monotonic()
        if self._first is None:
            self._first = done
        rate = (done - self._first) / max(now - self._began, 1e-9)
        if self._terminal:
            if now - self._began >= _AFTER:
                self._show(done, rate)
        elif now - self._said >= _EVERY:
            self._said = now
            self._report(f"{self._what}: {self._amount(done)}, {rate / 1e6:.1f} MB/s")

    def _amount(self, done: int) -> str:
        return f"{done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB" if self._total else f"{done / 1e6:,.0f} MB"

    def _show(self, done: int, rate: float) -> None:
        if self._bar is None:
            columns = [
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[amount]}"),
                TimeRemainingColumn(),
            ]
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.add_task(self._what, total=self._total or None, amount="")
            self._bar.start()
        amount = f"{self._amount(done)}, {rate / 1e6:.1f} MB/s"
        self._bar.update(
            self._bar.task_ids[0], completed=min(done, self._total) if self._total else done, amount=amount
        )
