"""Progress of reading a corpus: a bar on a terminal, otherwise a line every half minute."""

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
    """``update`` it with the bytes done so far; the rate is since the first update."""

    def __init__(self, what: str, total: int, report: Callable[[str], None]) -> None:
        """total: bytes, 0 if unknown; report: for the lines where there is no terminal."""
        self._what, self._total, self._report = what, total, report
        self._began = self._reported = time.monotonic()
        self._first: int | None = None
        columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}")]
        self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
        self._terminal = sys.stderr.isatty()

    def __enter__(self) -> ByteProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar.tasks:
            self._bar.stop()

    def update(self, done: int) -> None:
        """``done`` bytes of text are finished; the first call includes those of an earlier process."""
        now = time.monotonic()
        if self._first is None:
            self._first = done
        rate = (done - self._first) / max(now - self._began, 1e-9) / 1e6
        total = f" of {self._total / 1e6:,.0f}" if self._total else ""
        amount = f"{done / 1e6:,.0f}{total} MB, {rate:.1f} MB/s"
        if not self._terminal and now - self._reported >= _EVERY:
            self._reported = now
            self._report(f"{self._what}: {amount}")
        elif self._terminal and now - self._began >= _AFTER:
            if not self._bar.tasks:
                self._bar.add_task(self._what, total=self._total or None, amount="")
                self._bar.start()
            self._bar.update(self._bar.task_ids[0], completed=min(done, self._total or done), amount=amount)
