"""What a running job shows: a progress bar in a terminal, plain lines elsewhere, JSON lines on request."""

from __future__ import annotations

import json
import sys
from typing import Any, Literal

import lightning
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from hybridlm.config.duration import clock
from hybridlm.errors import for_stream
from hybridlm.machine.launcher import is_first_rank
from hybridlm.train.run_files import Row, RowLogger

_WIDE = 100  # columns of a terminal from which the speed is shown beside the bar
_SPEED = 60.0  # the remaining time is estimated from the speed of so many seconds


class Console(RowLogger, lightning.Callback):
    """Prints messages and, as a logger of Lightning, metrics; as a callback it moves the progress bar at every
    optimizer step, not only at logged ones. Silent on every rank but the first."""

    def __init__(self, headless: bool | Literal["auto"], max_steps: int, rich: RichConsole | None = None) -> None:
        """rich: the terminal's; None: that of standard output."""
        super().__init__()
        self._json, self._max_steps = headless is True, max_steps
        self._rich = rich or RichConsole(highlight=False)
        self._live = self._rich.is_terminal and not self._json and is_first_rank()
        self._progress: Progress | None = None
        self._metrics: dict[str, float] = {}  # the last value of each, shown beside the bar

    @rank_zero_only
    def say(self, text: str) -> None:
        """One message for people; if headless, a JSON object with it."""
        if self._json:
            print(json.dumps({"message": text}), flush=True)
        else:
            self._rich.print(for_stream(text, sys.stdout), markup=False, soft_wrap=True)
            sys.stdout.flush()

    @rank_zero_only
    def log_metrics(self, metrics: Row, step: int | None = None) -> None:
        if self._json:
            print(json.dumps({"step": step, **metrics}), flush=True)
            return
        numbers = {name: value for name, value in metrics.items() if not isinstance(value, list)}
        self._metrics |= numbers
        if self._live:
            self.reach(step or 0)
        else:
            print(self._plain(numbers, step or 0), flush=True)

    def _plain(self, metrics: dict[str, float], step: int) -> str:
        place = f"step {step:>{len(str(self._max_steps))}}/{self._max_steps}"
        if "val/loss" in metrics:
            accuracy = f"{metrics.get('val/accuracy', 0):.2%} right"
            quality = f"{metrics['val/bpb']:.4f} bits/byte" if "val/bpb" in metrics else accuracy
            return f"{place}  val loss {metrics['val/loss']:.4f}  {quality}"
        speed = metrics["perf/tokens_per_s"]
        tokens_left = metrics["data/tokens"] / max(step, 1) * (self._max_steps - step)
        eta = f"  {clock(tokens_left / speed)} left" if speed > 0 and step < self._max_steps else ""
        bpb = f"  {metrics['train/bpb']:.4f} bits/byte" if "train/bpb" in metrics else ""
        skipped = f"  {metrics['optim/skipped_steps']:.0f} skipped" if metrics.get("optim/skipped_steps") else ""
        loss = f"loss {metrics.get('train/loss', float('nan')):.4f}"
        if not metrics.get("data/targets", 1):
            loss = "no targets in its windows"
        return f"{place}  {loss}{bpb}  lr {metrics['optim/lr']:.2e}  {speed:,.0f} tokens/s{eta}{skipped}"

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.reach(trainer.global_step)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.reach(trainer.global_step)

    def reach(self, step: int) -> None:
        """Moves the progress bar, if there is one, to ``step``; draws it the first time."""
        if not self._live:
            return
        if self._progress is None:
            bar = BarColumn(bar_width=None, table_column=Column(ratio=1))  # all the width that the others leave
            facts = TextColumn("{task.fields[facts]}")
            columns = ("training", bar, MofNCompleteColumn(), facts, TimeElapsedColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self._rich, expand=True, speed_estimate_period=_SPEED)
            self._progress.add_task("", total=self._max_steps, completed=step, facts="")
            self._progress.start()
        self._progress.update(TaskID(0), completed=step, facts=self._facts())

    def _facts(self) -> str:
        """The figures beside the bar, blank while there is no value, so that the bar keeps its width."""
        found = self._metrics
        loss = f"{found['train/loss']:.3f}" if "train/loss" in found else ""
        val = f"{found['val/bpb']:.4f}" if "val/bpb" in found else ""
        if "val/accuracy" in found:
            val = f"{found['val/accuracy']:.1%}"
        facts = f"loss {loss:>7}  val {val:>6}"
        if self._rich.width >= _WIDE:
            facts += f"  {found.get('perf/tokens_per_s', 0):>9,.0f} tokens/s"
        if found.get("optim/skipped_steps"):
            facts += f"  {found['optim/skipped_steps']:.0f} skipped"
        return facts

    def close(self) -> None:
        """Ends the progress bar, so that the next message is printed below it."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
