"""The callbacks that a configuration asks for, and early stopping."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import lightning
import torch
from lightning.pytorch.callbacks import EarlyStopping

from hybridlm.data.synthetic.source import validation_lengths
from hybridlm.model.count import flops_per_token
from hybridlm.train.ema import EMA
from hybridlm.train.metrics import MetricsCallback
from hybridlm.train.router import RouterCallback, routers_of
from hybridlm.train.samples import SampleText
from hybridlm.train.ssm import mixer_metrics
from hybridlm.train.validation import InContextProbes, TaskAccuracy

if TYPE_CHECKING:
    from hybridlm.config.run import RunConfig
    from hybridlm.data.tokenizer import Tokenizer
    from hybridlm.machine.description import Machine
    from hybridlm.model.lm import HybridLM
    from hybridlm.runs.run_folder import RunFolder
    from hybridlm.train.console import Console
    from hybridlm.train.loggers import Remote
    from hybridlm.train.metrics import Clock, Metrics

Metering = tuple[list[RouterCallback], MetricsCallback]


def metering_callbacks(
    config: RunConfig, machine: Machine, model: HybridLM, tokenizer: Tokenizer, console: Console, clock: Clock
) -> Metering:
    """The one for routers, if there are any, and the one for metrics, which asks the first. ``clock`` is the trainer's
    profiler."""
    layers, log_every = routers_of(model), config.trainer.log_every
    routers = [RouterCallback(layers, log_every, console.say)] if layers else []

    def more(trainer: lightning.Trainer) -> Metrics:
        return (routers[0].metrics(trainer) if routers else {}) | mixer_metrics(model)

    return routers, MetricsCallback(
        log_every,
        clock,
        tokens_per_step=machine.global_batch * config.data.seq_len,
        flops_per_token=flops_per_token(model, config.data.seq_len, "train"),
        peak_flops=machine.peak_flops,
        token_bytes=torch.from_numpy(tokenizer.token_bytes()).long(),
        more=more,
    )


def extra_callbacks(
    config: RunConfig, folder: RunFolder, tokenizer: Tokenizer, remote: Remote, say: Callable[[str], None]
) -> list[lightning.Callback]:
    """Those that the configuration asks for. They must come before MetricsCallback. say: prints a line on the first
    rank."""
    asked, val_every, synthetic = config.callbacks, config.trainer.val_every or 0, config.data.source == "synthetic"
    callbacks: list[lightning.Callback] = []
    if asked.ema.decay is not None:
        callbacks.append(EMA(asked.ema.decay))
    if asked.samples.every is not None:
        interval = asked.samples.every * val_every
        callbacks.append(SampleText(asked.samples, config.seed, interval, tokenizer, folder, remote, say))
    if asked.early_stop.patience is not None:
        monitor = "val/loss" if synthetic else "val/bpb"
        callbacks.append(EarlyStop(monitor, asked.early_stop.patience, asked.early_stop.min_delta, say))
    if asked.probes.every is not None:
        callbacks.append(InContextProbes(asked.probes, asked.probes.every * val_every, tokenizer))
    if synthetic:
        callbacks.append(TaskAccuracy(validation_lengths(config.data)))
    return callbacks


class EarlyStop(EarlyStopping):
    """Lightning's, which stops training after ``patience`` validations in a row that did not improve on the best one by
    more than ``min_delta``; a score that is not finite does not improve.

    A resumed run continues to count, with the patience of its current configuration.
    """

    state_key = "EarlyStop"  # in a checkpoint

    def __init__(self, monitor: str, patience: int, min_delta: float, say: Callable[[str], None]) -> None:
        super().__init__(monitor, min_delta, patience, check_finite=False, check_on_train_epoch_end=False)
        self._say = say

    def state_dict(self) -> dict[str, Any]:
        return {"wait_count": self.wait_count, "best_score": float(self.best_score)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.wait_count, self.best_score = state_dict["wait_count"], torch.tensor(state_dict["best_score"])

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.should_stop and trainer.state.fn == "fit":
            self._say(
                f"early stop  step {trainer.global_step}: {self.monitor} has not improved on"
                f" {float(self.best_score):.4f} in {self.wait_count} validation{'s' if self.wait_count > 1 else ''}"
            )
