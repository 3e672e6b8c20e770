"""Metrics: what is measured, and the files metrics.jsonl and metrics.csv, which hold each step once, also after a resume."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from hybridlm.train.optim import HybridOptimizer

Metrics = dict[str, float | list[float]]  # a list: one number per expert of a router

# The columns of metrics.csv. metrics.jsonl holds them too, and what routers report (moe/LAYER/...), whose names depend on the model.
COLUMNS = ("step", "train/loss", "val/loss", "val/bpb", "optim/lr", "optim/grad_norm", "perf/tokens_per_s", "data/tokens")


class Rows:
    """An append-only text file of one line per step. A second call for the last step rewrites its line."""

    def __init__(self, path: Path, encode: Callable[[Metrics], str]) -> None:
        """``path`` exists; ``encode`` gives a row's line with its end."""
        self._path, self._encode = path, encode
        self._start = 0  # offset of the last line

    def write(self, row: Metrics, *, again: bool) -> None:
        line = self._encode(row).encode()
        with open(self._path, "r+b") as file:
            self._start = file.seek(self._start) if again else file.seek(0, io.SEEK_END)
            file.truncate()
            file.write(line)


def _csv_line(row: Metrics) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow([row.get(name, "") for name in COLUMNS])
    return text.getvalue()


class RunFiles(Logger):
    """metrics.jsonl and metrics.csv of a run folder."""

    def __init__(self, jsonl: Path, csv_file: Path, *, resume_step: int | None) -> None:
        """``resume_step``: steps after it are dropped from files of an earlier session; None: a new run."""
        super().__init__()
        self._row: Metrics = {}
        kept = _rows_until(jsonl, resume_step) if resume_step is not None else []
        jsonl.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        csv_file.write_text(",".join(COLUMNS) + "\n" + "".join(map(_csv_line, kept)), encoding="utf-8")
        self._files = (Rows(jsonl, lambda row: json.dumps(row) + "\n"), Rows(csv_file, _csv_line))

    @rank_zero_only
    def log_metrics(self, metrics: Metrics, step: int | None = None) -> None:  # type: ignore[override]
        again = self._row.get("step") == step
        self._row = {**(self._row if again else {"step": step or 0}), **metrics}
        for file in self._files:
            file.write(self._row, again=again)

    def log_hyperparams(self, params: Any = None) -> None:
        """The configuration is in config.yaml."""

    @property
    def name(self) -> str:
        return "files"

    @property
    def version(self) -> str:
        return ""


def _rows_until(jsonl: Path, step: int) -> list[Metrics]:
    """The rows up to ``step``; a line cut short by a crash ends them."""
    rows: list[Metrics] = []
    if not jsonl.exists():
        return rows
    for line in jsonl.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row["step"] > step:
            break
        rows.append(row)
    return rows


class MetricsCallback(lightning.Callback):
    """Hands metrics to every logger: training ones every ``log_every`` optimizer steps, validation ones when they come."""

    def __init__(self, log_every: int, *, tokens_per_step: int, more: Callable[[lightning.Trainer], Metrics] | None = None) -> None:
        """``more``: further metrics of a logged step, asked for on every rank."""
        self._log_every, self._tokens_per_step, self._more = log_every, tokens_per_step, more
        self._step = 0
        self._loss: Tensor | None = None  # sum over the micro-batches of the running step
        self._steps_timed = 0
        self._seconds = 0.0  # of training alone: validation and checkpoints do not count
        self._since = 0.0
        self.train_seconds, self.train_steps = 0.0, 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int) -> None:
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        share = outputs["loss_sum"] / outputs["n_targets"]
        self._loss = share if self._loss is None else self._loss + share
        stepped = trainer.global_step != self._step
        due = stepped and (trainer.global_step % self._log_every == 0 or trainer.global_step in (1, trainer.max_steps))
        # Reading a number waits for the device, so that the clock is stopped after the work is really done.
        loss = float(trainer.strategy.reduce(self._loss, reduce_op="sum")) if due else 0.0
        self._seconds += time.perf_counter() - self._since
        if not stepped:
            return
        self._step, self._loss = trainer.global_step, None
        self._steps_timed += 1
        if not due:
            return
        optimizer = trainer.optimizers[0]
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Lightning may wrap it
        assert isinstance(optimizer, HybridOptimizer)
        assert optimizer.grad_norm is not None
        speed = self._steps_timed * self._tokens_per_step / self._seconds
        if self._step > 1:  # the first step also warms up allocators and kernels
            self.train_seconds, self.train_steps = self.train_seconds + self._seconds, self.train_steps + self._steps_timed
        self._seconds, self._steps_timed = 0.0, 0
        metrics: Metrics = {
            "train/loss": loss,
            "optim/lr": optimizer.used_lr,
            "optim/grad_norm": float(optimizer.grad_norm),
            "perf/tokens_per_s": round(speed, 1),
            "data/tokens": self._step * self._tokens_per_step,
        }
        self._write(trainer, metrics if self._more is None else metrics | self._more(trainer))

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._write(trainer, {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")})

    def _write(self, trainer: lightning.Trainer, metrics: Metrics) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=self._step)

    @property
    def tokens_per_s(self) -> float:
        """Over the whole session, its first step left out."""
        return self.train_steps * self._tokens_per_step / self.train_seconds if self.train_seconds else 0.0
