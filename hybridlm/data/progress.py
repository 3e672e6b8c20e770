"""Progress of reading a corpus: a bar on a terminal, otherwise a line every half minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_EVERY = 30.0  # seconds between lines
_AFTER = 1.0  # seconds before a bar appears: short work needs none


class ByteProgress(Progress):
    """``update_to`` it with the bytes done so far; the rate is since the first update. Ends as a context manager."""

    def __init__(self, what: str, total: int, report: Callable[[str], None]) -> None:
        """total: bytes, 0 if unknown; report: for the lines where there is no terminal."""
        columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}")]
        super().__init__(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
        self._what, self._total, self._report = what, total, report
        self._began = self._reported = time.monotonic()
        self._first: int | None = None
        self._task = self.add_task(what, total=total or None, amount="")

    def __enter__(self) -> ByteProgress:
        return self

    def stop(self) -> None:
        if self.live.is_started:  # rich prints an empty line for a bar that never was
            super().stop()

    def update_to(self, done: int) -> None:
        """``done`` bytes of text are finished; the first call includes those of an earlier process."""
        now = time.monotonic()
        if self._first is None:
            self._first = done
        rate = (done - self._first) / max(now - self._began, 1e-9) / 1e6
        total = f" of {self._total / 1e6:,.0f}" if self._total else ""
        amount = f"{done / 1e6:,.0f}{total} MB, {rate:.1f} MB/s"
        if sys.stderr.isatty():
            self.update(self._task, completed=min(done, self._total or done), amount=amount)
            if now - self._began >= _AFTER:
                self.start()
        elif now - self._reported >= _EVERY:
            self._reported = now
            self._report(f"{self._what}: {amount}")
