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

from hybridlm.config.run import RunConfig
from hybridlm.machine.description import Machine
from hybridlm.machine.device import peak_memory_gb
from hybridlm.model.count import flops_per_token
from hybridlm.model.lm import HybridLM
from hybridlm.train.lightning_module import hybrid_optimizer
from hybridlm.train.objective import MEASURES
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
    "train/margin",
    "train/accuracy",
    "train/reward_chosen",
    "train/reward_rejected",
    "val/margin",
    "val/reward_chosen",
    "val/reward_rejected",
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

# What is timed, by the names that Lightning 2.6 and MetricsCallback give the profiler.
_TIMED = {"[_TrainingEpochLoop].train_dataloader_next": "data", "save_checkpoint": "ckpt", "step": "step", "val": "val"}


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


class Clock(Profiler):
    """``seconds`` that this process has spent in training steps, waiting for their data, in validation and writing
    checkpoints, as a profiler of Lightning. None includes another."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = dict.fromkeys(_TIMED.values(), 0.0)
        self._asked = dict(self.seconds)
        self._began: dict[str, float] = {}

    def start(self, action_name: str) -> None:
        self._began[action_name] = time.perf_counter()

    def stop(self, action_name: str) -> None:
        began = self._began.pop(action_name, None)
        if began is not None and action_name in _TIMED:
            self.seconds[_TIMED[action_name]] += time.perf_counter() - began

    def lap(self, kind: str) -> float:
        """Seconds of ``kind`` since it was last asked for."""
        seconds = self.seconds[kind] - self._asked[kind]
        self._asked[kind] = self.seconds[kind]
        return seconds


class MetricsCallback(lightning.Callback):
    """Passes metrics to every logger: training metrics every ``log_every`` optimizer steps, validation metrics when a
    validation ends.

    Loggers are called in their order, so that the files come first.
    """

    def __init__(
        self,
        config: RunConfig,
        machine: Machine,
        model: HybridLM,
        token_bytes: Tensor,
        clock: Clock,
        more: Callable[[lightning.Trainer], Metrics],
    ) -> None:
        """token_bytes: (V,) bytes of text per id. clock: the trainer's profiler. more: further metrics of a logged
        step, called on every rank."""
        self._log_every, self._clock, self._more = config.trainer.log_every, clock, more
        self._tokens_per_step = machine.global_batch * config.data.sequences * config.data.seq_len
        self._preferences = config.optim.objective == "dpo"
        self._flops_per_token = flops_per_token(model, config.data.seq_len, "train")  # as the layers count them
        self._peak_flops, self._token_bytes = machine.peak_flops, token_bytes
        self._loss: Tensor | float = 0.0  # sum over the micro-batches of the current step
        self._counted: Tensor | int = 0  # (2,) bytes of text and targets, likewise
        self._measured: Tensor | int = 0  # (4,) of preferences, likewise
        self._rates: dict[str, float] = {}  # by role, of the last optimizer step
        self._step = self._logged = 0  # the last optimizer step, and the last one that was logged
        self._memory: float | None = None
        self._rate_seconds, self._rate_steps = 0.0, 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._step = self._logged = trainer.global_step
        self._token_bytes = self._token_bytes.to(pl_module.device)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._clock.start("step")

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """The learning rates of this step: once it is over, the schedule has moved on."""
        scale = hybrid_optimizer(trainer).rate_scale  # the guard's
        self._rates = {group["name"].partition(",")[0]: scale * group["lr"] for group in optimizer.param_groups}

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._loss = self._loss + outputs["loss_sum"] / outputs["n_targets"]
        if self._preferences:
            self._measured = self._measured + outputs["measured"] / outputs["n_targets"]
        learned = batch["targets"] >= 0
        text_bytes = (self._token_bytes[batch["targets"].clamp(min=0)] * learned).sum()
        self._counted = self._counted + torch.stack([text_bytes, learned.sum()])
        step = trainer.global_step
        stepped = step != self._step
        due = stepped and (step % self._log_every == 0 or step in (1, trainer.max_steps))
        losses = self._losses(trainer) if due else {}  # waits for the device: the time is taken after the work is done
        self._clock.stop("step")
        if stepped:
            self._step, self._loss, self._counted, self._measured = step, 0.0, 0, 0
        if due:
            self._write(
                trainer, losses | self._state(trainer, pl_module) | self._position(trainer) | self._more(trainer)
            )

    def _losses(self, trainer: lightning.Trainer) -> Metrics:
        loss = float(trainer.strategy.reduce(self._loss, reduce_op="sum"))
        text_bytes, targets = trainer.strategy.reduce(self._counted, reduce_op="sum").tolist()
        metrics: Metrics = {"data/targets": targets}
        if self._preferences:
            measured = trainer.strategy.reduce(self._measured, reduce_op="sum").tolist()
            return (
                metrics
                | {"train/loss": loss}
                | dict(zip([f"train/{name}" for name in MEASURES], measured, strict=True))
            )
        if targets:  # otherwise there is no loss, and 0 would look like one
            metrics |= {"train/loss": loss, "train/ppl": perplexity(loss)}
        if text_bytes:
            metrics["train/bpb"] = loss * targets / math.log(2) / text_bytes
        return metrics

    def _state(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> Metrics:
        """Of the optimizer, and the speed since the last call."""
        optimizer, steps, self._logged = hybrid_optimizer(trainer), self._step - self._logged, self._step
        assert optimizer.grad_norm is not None
        training, waited, written = (self._clock.lap(kind) for kind in ("step", "data", "ckpt"))
        if self._step > 1:  # the first step also warms up allocators and kernels
            self._rate_seconds += training + waited
            self._rate_steps += steps
        tokens_per_s = steps * self._tokens_per_step / (training + waited)
        self._memory = peak_memory_gb(module.device)
        metrics: Metrics = {
            "optim/lr": optimizer.used_lr,
            **{f"optim/lr/{role}": rate for role, rate in self._rates.items()},
            "optim/grad_norm": float(optimizer.grad_norm),
            "optim/skipped_steps": optimizer.skipped,
            "perf/tokens_per_s": round(tokens_per_s, 1),
            **self._flops(tokens_per_s, "perf/"),
            "perf/step_s": training / steps,
            "perf/data_s": waited / steps,
        }
        if written:
            metrics["perf/ckpt_s"] = written
        if self._memory is not None:
            metrics["perf/memory_gb"] = self._memory
        return metrics

    def _flops(self, tokens_per_s: float, prefix: str = "") -> dict[str, float]:
        """Model FLOPs per second, and their share of the peak if that is known."""
        flops = tokens_per_s * self._flops_per_token
        share = {} if self._peak_flops is None else {f"{prefix}mfu": flops / self._peak_flops}
        return {f"{prefix}flops_per_s": flops, **share}

    def _position(self, trainer: lightning.Trainer) -> Metrics:
        micro_batches = self._step * trainer.accumulate_grad_batches
        return {
            "data/tokens": self._step * self._tokens_per_step,
            "data/epoch": micro_batches / trainer.num_training_batches,
        }

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._clock.start("val")

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._clock.stop("val")
        if trainer.state.fn != "fit":  # the last one, on all held-out text, goes into the summary
            return
        measured = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(MEASURED)}
        further = {"perf/val_s": self._clock.lap("val")}
        if not self._preferences:
            further["val/ppl"] = perplexity(measured["val/loss"])
        self._write(trainer, {**measured, **further, **self._position(trainer)})

    def _write(self, trainer: lightning.Trainer, metrics: Metrics) -> None:
        # JSON has no NaN: in the row of a step whose loss is not finite, the guard's count shows it.
        finite = {name: value for name, value in metrics.items() if isinstance(value, list) or math.isfinite(value)}
        for logger in trainer.loggers:
            logger.log_metrics(finite, step=self._step)  # type: ignore[arg-type]  # ours take lists

    def throughput(self) -> dict[str, float | None]:
        """For summary.json: FLOPs per token (counted before the weights were sharded), and of this session tokens and
        model FLOPs per second without the first step, peak memory in GiB, and where the seconds went."""
        tokens_per_s = self._rate_steps * self._tokens_per_step / self._rate_seconds if self._rate_seconds else 0.0
        return {
            "train_flops_per_token": self._flops_per_token,
            "tokens_per_s": tokens_per_s,
            "mfu": None,
            **self._flops(tokens_per_s),
            "memory_gb": self._memory,
            **{f"{kind}_seconds": seconds for kind, seconds in self._clock.seconds.items()},
        }
