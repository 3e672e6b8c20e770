"""Metrics of training and validation steps, and where the time of a run goes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import lightning
import torch
from lightning.pytorch.profilers import Profiler
from torch import Tensor

from hybridlm.machine.device import peak_memory_gb
from hybridlm.train.lightning_module import hybrid_optimizer
from hybridlm.train.validation import MEASURED

Metrics = dict[str, float | list[float]]  # a list: one number per expert of a router

# The columns of metrics.csv. metrics.jsonl has these, and those whose names depend on the model (moe/LAYER/...,
# optim/lr/ROLE). docs/metrics.md explains each.
COLUMNS = (
    "step",
    "train/loss",
    "train/ppl",
    "train/bpb",
    "val/loss",
    "val/ppl",
    "val/bpb",
    "val/ema_loss",
    "val/ema_bpb",
    "val/accuracy",
    "val/exact",
    "probe/induction/loss",
    "probe/induction/baseline",
    "probe/induction/accuracy",
    "probe/copying/loss",
    "probe/copying/baseline",
    "probe/copying/accuracy",
    "optim/lr",
    "optim/grad_norm",
    "optim/skipped_steps",
    "perf/tokens_per_s",
    "perf/flops_per_s",
    "perf/mfu",
    "perf/step_s",
    "perf/data_s",
    "perf/val_s",
    "perf/ckpt_s",
    "perf/memory_gb",
    "data/tokens",
    "data/targets",
    "data/epoch",
)

DATA, CHECKPOINTS = "data", "checkpoints"


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


class Clock(Profiler):
    """``seconds`` that this process has spent waiting for training data and writing checkpoints, by the marks that
    Lightning's loop sets for profilers. Neither includes the other."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = {DATA: 0.0, CHECKPOINTS: 0.0}
        self._began: dict[str, float] = {}

    @staticmethod
    def _kind(action: str) -> str | None:
        """What an action of Lightning 2.6 counts as, if it is timed."""
        if action.endswith(".train_dataloader_next"):
            return DATA
        return CHECKPOINTS if action == "save_checkpoint" else None

    def start(self, action_name: str) -> None:
        if (kind := self._kind(action_name)) is not None:
            self._began[kind] = time.perf_counter()

    def stop(self, action_name: str) -> None:
        if (kind := self._kind(action_name)) is not None and kind in self._began:
            self.seconds[kind] += time.perf_counter() - self._began.pop(kind)


class MetricsCallback(lightning.Callback):
    """Passes metrics to every logger: training metrics every ``log_every`` optimizer steps, validation metrics when a
    validation ends.

    Loggers are called in their order, so that the files come first.
    """

    def __init__(
        self,
        log_every: int,
        clock: Clock,
        *,
        tokens_per_step: int,
        flops_per_token: float,
        peak_flops: float | None,
        token_bytes: Tensor,
        more: Callable[[lightning.Trainer], Metrics] = lambda trainer: {},
    ) -> None:
        """clock: the trainer's profiler. flops_per_token: of training, as the layers count them. peak_flops: of all
        devices per second; None: unknown. token_bytes: (V,) bytes of text per id. more: further metrics of a logged
        step, called on every rank."""
        self._log_every, self._clock, self._more = log_every, clock, more
        self._tokens_per_step, self._flops_per_token, self._peak_flops = tokens_per_step, flops_per_token, peak_flops
        self._token_bytes = token_bytes
        self._step = 0
        self._loss: Tensor | None = None  # sum over the micro-batches of the current step
        self._counted: Tensor | None = None  # (2,) bytes of text and targets, likewise
        self._rates: dict[str, float] = {}  # by role, of the last optimizer step
        self._steps_timed = 0
        self._seconds = 0.0  # of training alone: data, validation and checkpoints do not count
        self._logged = dict(clock.seconds)  # those of the clock that earlier rows have reported
        self._since = self._validating = 0.0
        self._memory: float | None = None
        self._of_steps = self._of_validation = 0.0
        self._train_seconds, self._train_steps = 0.0, 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._step = trainer.global_step
        self._token_bytes = self._token_bytes.to(pl_module.device)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._since = time.perf_counter()

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """The learning rates of this step: once it is over, the schedule has moved on."""
        scale = hybrid_optimizer(trainer).rate_scale  # the guard's
        self._rates = {group["name"].partition(",")[0]: scale * group["lr"] for group in optimizer.param_groups}

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        share = outputs["loss_sum"] / outputs["n_targets"]
        self._loss = share if self._loss is None else self._loss + share
        learned = batch["targets"] >= 0
        counted = torch.stack([(self._token_bytes[batch["targets"].clamp(min=0)] * learned).sum(), learned.sum()])
        self._counted = counted if self._counted is None else self._counted + counted
        stepped = trainer.global_step != self._step
        due = stepped and (trainer.global_step % self._log_every == 0 or trainer.global_step in (1, trainer.max_steps))
        loss = text_bytes = targets = 0.0
        if due:  # reading a number waits for the device, so that the time is taken after the work is really done
            loss = float(trainer.strategy.reduce(self._loss, reduce_op="sum"))
            text_bytes, targets = trainer.strategy.reduce(self._counted, reduce_op="sum").tolist()
        self._seconds += time.perf_counter() - self._since
        if not stepped:
            return
        self._step, self._loss, self._counted = trainer.global_step, None, None
        self._steps_timed += 1
        if not due:
            return
        metrics: Metrics = {"data/targets": int(targets)}
        if targets:  # otherwise there is no loss, and 0 would look like one
            metrics |= {"train/loss": loss, "train/ppl": perplexity(loss)}
        if text_bytes:
            metrics["train/bpb"] = loss * targets / math.log(2) / text_bytes
        metrics |= self._optimizer(trainer) | self._performance(trainer, pl_module) | self._position(trainer)
        self._write(trainer, metrics | self._more(trainer))

    def _optimizer(self, trainer: lightning.Trainer) -> Metrics:
        optimizer = hybrid_optimizer(trainer)
        assert optimizer.grad_norm is not None
        return {
            "optim/lr": optimizer.used_lr,
            **{f"optim/lr/{role}": rate for role, rate in self._rates.items()},
            "optim/grad_norm": float(optimizer.grad_norm),
            "optim/skipped_steps": optimizer.skipped,
        }

    def _performance(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> Metrics:
        """Of the steps since the last call."""
        waited, written = (self._clock.seconds[kind] - self._logged[kind] for kind in (DATA, CHECKPOINTS))
        self._logged = dict(self._clock.seconds)
        seconds = self._seconds + waited
        tokens_per_s = self._steps_timed * self._tokens_per_step / seconds
        if self._step > 1:  # the first step also warms up allocators and kernels
            self._train_seconds, self._train_steps = (
                self._train_seconds + seconds,
                self._train_steps + self._steps_timed,
            )
        metrics: Metrics = {
            "perf/tokens_per_s": round(tokens_per_s, 1),
            "perf/flops_per_s": tokens_per_s * self._flops_per_token,
        }
        if self._peak_flops is not None:
            metrics["perf/mfu"] = tokens_per_s * self._flops_per_token / self._peak_flops
        metrics |= {"perf/step_s": self._seconds / self._steps_timed, "perf/data_s": waited / self._steps_timed}
        if written:
            metrics["perf/ckpt_s"] = written
        self._memory = peak_memory_gb(pl_module.device)
        if self._memory is not None:
            metrics["perf/memory_gb"] = self._memory
        self._of_steps += self._seconds
        self._seconds, self._steps_timed = 0.0, 0
        return metrics

    def _position(self, trainer: lightning.Trainer) -> Metrics:
        micro_batches = self._step * trainer.accumulate_grad_batches
        return {
            "data/tokens": self._step * self._tokens_per_step,
            "data/epoch": micro_batches / trainer.num_training_batches,
        }

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._validating = time.perf_counter()

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        seconds = time.perf_counter() - self._validating
        self._of_validation += seconds
        if trainer.state.fn != "fit":  # the last one, on all held-out text, goes into the summary
            return
        measured = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(MEASURED)}
        further = {"val/ppl": perplexity(measured["val/loss"]), "perf/val_s": seconds}
        self._write(trainer, {**measured, **further, **self._position(trainer)})

    def _write(self, trainer: lightning.Trainer, metrics: Metrics) -> None:
        # JSON has no NaN: in the row of a step whose loss is not finite, the guard's count shows it.
        finite = {name: value for name, value in metrics.items() if isinstance(value, list) or math.isfinite(value)}
        for logger in trainer.loggers:
            logger.log_metrics(finite, step=self._step)  # type: ignore[arg-type]  # ours take lists

    @property
    def tokens_per_s(self) -> float:
        """Over this session, without its first step."""
        return self._train_steps * self._tokens_per_step / self._train_seconds if self._train_seconds else 0.0

    def throughput(self) -> dict[str, float | None]:
        """For summary.json, of this session: where its seconds went, model FLOPs per second, and peak memory in GiB."""
        flops = self.tokens_per_s * self._flops_per_token
        return {
            "flops_per_s": flops,
            "mfu": None if self._peak_flops is None else flops / self._peak_flops,
            "memory_gb": self._memory,
            "step_seconds": self._of_steps,
            "data_seconds": self._clock.seconds[DATA],
            "val_seconds": self._of_validation,
            "ckpt_seconds": self._clock.seconds[CHECKPOINTS],
        }
