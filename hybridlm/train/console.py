"""What a person, or a program, sees of a run while it goes: a progress bar in a terminal, plain lines elsewhere, JSON lines on request."""

from __future__ import annotations

import json
import sys
from typing import Any, Literal

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hybridlm.config.duration import clock
from hybridlm.errors import for_stream


class Console(Logger):
    """Prints messages, and metrics as a Lightning logger. Silent on every rank but the first."""

    def __init__(self, headless: bool | Literal["auto"], max_steps: int) -> None:
        super().__init__()
        self._json = headless is True
        self._max_steps = max_steps
        self._rich = RichConsole(highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._task: Any = None
        self._live = self._rich.is_terminal and headless is not True and rank_zero_only.rank == 0
        self._best = ""

    @rank_zero_only
    def say(self, text: str) -> None:
        """One message, for people; under headless a JSON object that holds it."""
        if self._json:
            print(json.dumps({"message": text}), flush=True)
        else:
            self._rich.print(for_stream(text, sys.stdout), markup=False)
            sys.stdout.flush()

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self._json:
            print(json.dumps({"step": step, **metrics}), flush=True)
            return
        if "val/loss" in metrics:
            self._best = f"val {_quality(metrics)}"
        if self._live:
            self._update(metrics, step or 0)
        else:
            self._plain(metrics, step or 0)

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
            print(f"{place}  loss {metrics.get('train/loss', float('nan')):.4f}{bpb}  {rate}{eta}{skipped}", flush=True)

    def _update(self, metrics: dict[str, float], step: int) -> None:
        if self._progress is None:
            self._progress = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}"),
                TextColumn("{task.fields[speed]} tokens/s"),
                TextColumn("{task.fields[val]}"),
                TextColumn("{task.fields[skipped]}", style="red"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._rich,
            )
            self._task = self._progress.add_task("", total=self._max_steps, completed=step, loss="", speed="", val="", skipped="")
            self._progress.start()
        fields: dict[str, str] = {"val": self._best}
        if "train/loss" in metrics:
            bpb = f" ({metrics['train/bpb']:.3f} bits/byte)" if "train/bpb" in metrics else ""
            fields |= {"loss": f"{metrics['train/loss']:.3f}{bpb}", "speed": f"{metrics['perf/tokens_per_s']:,.0f}"}
            if metrics.get("optim/skipped_steps"):
                fields["skipped"] = f"{metrics['optim/skipped_steps']:.0f} skipped"
        self._progress.update(self._task, completed=step, **fields)  # type: ignore[arg-type]

    def close(self) -> None:
        """Ends the progress bar, so that what is printed next stands below it."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def log_hyperparams(self, params: Any = None) -> None:
        """The configuration is in config.yaml."""

    @property
    def name(self) -> str:
        return "console"

    @property
    def version(self) -> str:
        return ""


def _quality(metrics: dict[str, float]) -> str:
    """How good the model is: bits per byte of text, or the share of a synthetic task's answers that are right."""
    return f"{metrics['val/bpb']:.4f} bits/byte" if "val/bpb" in metrics else f"{metrics['val/accuracy']:.2%} right"
