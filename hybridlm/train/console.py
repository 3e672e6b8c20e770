"""What a running job shows: a progress bar in a terminal, plain lines elsewhere, JSON lines on request."""

from __future__ import annotations

import json
import sys
from typing import Any, Literal

import lightning
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from hybridlm.config.duration import clock
from hybridlm.errors import for_stream
from hybridlm.machine.launcher import is_first_rank
from hybridlm.train.run_files import Row, RowLogger

_WIDE, _WIDEST = 100, 150  # columns of a terminal from which more is shown beside the bar
_SPEED = 60.0  # the remaining time is estimated from the speed of so many seconds


class Console(RowLogger):
    """Prints messages and, as a Lightning logger, metrics. Silent on every rank but the first."""

    def __init__(self, headless: bool | Literal["auto"], max_steps: int, rich: RichConsole | None = None) -> None:
        """rich: the terminal's; None: that of standard output."""
        super().__init__()
        self._json = headless is True
        self._max_steps = max_steps
        self._rich = rich or RichConsole(highlight=False)
        self._progress: Progress | None = None
        self._task: Any = None
        self._live = self._rich.is_terminal and headless is not True and is_first_rank()

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
        numbers = {name: value for name, value in metrics.items() if not isinstance(value, list)}
        if self._json:
            print(json.dumps({"step": step, **metrics}), flush=True)
        elif self._live:
            self.reach(step or 0)
            assert self._progress is not None
            self._progress.update(self._task, metrics=self._progress.tasks[0].fields["metrics"] | numbers)
        else:
            self._plain(numbers, step or 0)

    def _plain(self, metrics: dict[str, float], step: int) -> None:
        place = f"step {step:>{len(str(self._max_steps))}}/{self._max_steps}"
        if "val/loss" in metrics:
            print(f"{place}  val loss {metrics['val/loss']:.4f}  {_quality(metrics)}", flush=True)
        else:
            speed = metrics["perf/tokens_per_s"]
            tokens_left = metrics["data/tokens"] / max(step, 1) * (self._max_steps - step)
            eta = f"  {clock(tokens_left / speed)} left" if speed > 0 and step < self._max_steps else ""
            bpb = f"  {metrics['train/bpb']:.4f} bits/byte" if "train/bpb" in metrics else ""
            skipped = f"  {metrics['optim/skipped_steps']:.0f} skipped" if metrics.get("optim/skipped_steps") else ""
            rate = f"lr {metrics['optim/lr']:.2e}  {speed:,.0f} tokens/s"
            loss = (
                f"loss {metrics.get('train/loss', float('nan')):.4f}"
                if metrics.get("data/targets", 1)
                else "no targets in its windows"
            )
            print(f"{place}  {loss}{bpb}  {rate}{eta}{skipped}", flush=True)

    def reach(self, step: int) -> None:
        """Moves the progress bar, if there is one, to ``step``; draws it the first time."""
        if not self._live:
            return
        if self._progress is None:
            bar = BarColumn(bar_width=None, table_column=Column(ratio=1))  # all the width that the facts leave
            columns = (TextColumn("training"), bar, _Facts(self._rich))
            self._progress = Progress(*columns, console=self._rich, expand=True, speed_estimate_period=_SPEED)
            self._task = self._progress.add_task("", total=self._max_steps, completed=step, metrics={})
            self._progress.start()
        self._progress.update(self._task, completed=step)

    def close(self) -> None:
        """Ends the progress bar, so that the next message is printed below it."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class _Facts(ProgressColumn):
    """The figures beside the bar, more in a wide terminal; each always takes the same width, so that the bar does
    too."""

    def __init__(self, console: RichConsole) -> None:
        super().__init__()
        self._console = console

    def render(self, task: Task) -> Text:
        metrics: dict[str, float] = task.fields["metrics"]
        width, total = self._console.width, f"{task.total:.0f}"
        wide = width >= _WIDE
        parts = [f"{task.completed:>{len(total)}.0f}/{total}", _padded("loss ", metrics.get("train/loss"), 7, ".3f")]
        if width >= _WIDEST:
            parts.append(_padded("", metrics.get("train/bpb"), 6, ".3f", " bits/byte"))
        measured = "val/bpb" if "val/accuracy" not in metrics else "val/accuracy"
        form, unit = (".4f", " bits/byte") if measured == "val/bpb" else (".1%", " right    ")
        parts.append(_padded("val ", metrics.get(measured), 6, form, unit if wide else ""))
        if wide:
            parts.append(_padded("", metrics.get("perf/tokens_per_s"), 9, ",.0f", " tokens/s"))
            parts.append(f"{clock(task.finished_time or task.elapsed or 0.0):>7}")
        left = None if task.finished else task.time_remaining
        parts.append(f"{'' if left is None else f'{clock(left)} left':>12}")
        if metrics.get("optim/skipped_steps"):
            parts.append(f"{metrics['optim/skipped_steps']:.0f} skipped")
        return Text(" ".join(parts), no_wrap=True)


def _padded(before: str, value: float | None, width: int, form: str, unit: str = "") -> str:
    """A figure with its label and unit; as many blanks while there is no value."""
    text = f"{before}{value:>{width}{form}}{unit}" if value is not None else ""
    return text.rjust(len(before) + width + len(unit))


class Steps(lightning.Callback):
    """Moves the progress bar at every optimizer step, not only at logged ones."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._console.reach(trainer.global_step)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        self._console.reach(trainer.global_step)


def _quality(metrics: dict[str, float]) -> str:
    """Bits per byte of text, or a synthetic task's accuracy."""
    return f"{metrics['val/bpb']:.4f} bits/byte" if "val/bpb" in metrics else f"{metrics['val/accuracy']:.2%} right"
