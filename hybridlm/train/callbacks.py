"""What may happen beside the loop: text sampled on the way, an early end, histograms of gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import lightning
import torch
from torch import Tensor

from hybridlm.data.synthetic.source import validation_lengths
from hybridlm.model.count import flops_per_token
from hybridlm.train.answers import Answers
from hybridlm.train.compiled import eager
from hybridlm.train.ema import EMA
from hybridlm.train.metrics import Costs, MetricsCallback, validation_score
from hybridlm.train.probes import Probes
from hybridlm.train.router import RouterCallback, routers_of
from hybridlm.train.samples import sampled, write_samples
from hybridlm.train.ssm import mixer_metrics

if TYPE_CHECKING:
    from hybridlm.config.logging import EarlyStopConfig, SamplesConfig
    from hybridlm.config.run import RunConfig
    from hybridlm.data.tokenizer import Tokenizer
    from hybridlm.machine.description import Machine
    from hybridlm.model.lm import HybridLM
    from hybridlm.runs.run_folder import RunFolder
    from hybridlm.train.clock import Clock
    from hybridlm.train.console import Console
    from hybridlm.train.loggers import Remote
    from hybridlm.train.metrics import Metrics

Metering = tuple[list[RouterCallback], MetricsCallback]

_EARLY_STOP = "hybridlm_early_stop"  # of its state in a checkpoint
_BINS = 64


def metering_callbacks(
    config: RunConfig, machine: Machine, model: HybridLM, tokenizer: Tokenizer, console: Console, clock: Clock
) -> Metering:
    """The one for routers, where there are any, and the one for metrics, which asks the first. ``clock`` is the
    trainer's profiler."""
    layers, log_every = routers_of(model), config.trainer.log_every
    routers = [RouterCallback(layers, log_every, console.say)] if layers else []
    costs = Costs(
        tokens_per_step=machine.global_batch * config.data.seq_len,
        flops_per_token=flops_per_token(model, config.data.seq_len, "train"),
        peak_flops=machine.peak_flops,
        token_bytes=torch.from_numpy(tokenizer.token_bytes()).long(),
    )

    def more(trainer: lightning.Trainer) -> Metrics:
        return (routers[0].metrics(trainer) if routers else {}) | mixer_metrics(model)

    return routers, MetricsCallback(log_every, costs, clock, more)


def extra_callbacks(
    config: RunConfig, folder: RunFolder, tokenizer: Tokenizer, remote: Remote | None, say: Callable[[str], None]
) -> list[lightning.Callback]:
    """Those that the configuration asks for. They stand before MetricsCallback. say: prints a line on the first
    rank."""
    callbacks: list[lightning.Callback] = []
    if config.callbacks.ema.decay is not None:
        callbacks.append(EMA(config.callbacks.ema.decay))
    if config.callbacks.samples.every is not None and config.trainer.val_every is not None:  # else refused
        interval = config.callbacks.samples.every * config.trainer.val_every
        callbacks.append(SampleText(config.callbacks.samples, config.seed, interval, tokenizer, folder, remote, say))
    if config.callbacks.early_stop.patience is not None:
        callbacks.append(EarlyStop(config.callbacks.early_stop, say))
    if config.callbacks.probes.every is not None and config.trainer.val_every is not None:
        callbacks.append(
            Probes(config.callbacks.probes, config.callbacks.probes.every * config.trainer.val_every, tokenizer)
        )
    if config.data.source == "synthetic":
        callbacks.append(Answers(validation_lengths(config.data)))
    if config.logger.gradients:
        callbacks.append(Gradients(config.trainer.log_every, remote))
    return callbacks


class SampleText(lightning.Callback):
    """Continues the prompts after each validation whose step ``interval`` divides, into samples/step-00000100.txt. Rank
    0's work alone."""

    def __init__(
        self,
        config: SamplesConfig,
        seed: int,
        interval: int,
        tokenizer: Tokenizer,
        folder: RunFolder,
        remote: Remote | None,
        say: Callable[[str], None],
    ) -> None:
        self._config, self._seed, self._interval, self._say = config, seed, interval, say
        self._tokenizer, self._folder, self._remote = tokenizer, folder, remote

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        step = trainer.global_step
        if trainer.state.fn != "fit" or step % self._interval != 0 or not trainer.is_global_zero:
            return
        training = pl_module.model.training
        pl_module.model.eval()
        with eager(pl_module.model):  # the cache grows with each token
            texts = sampled(pl_module.model, self._tokenizer, self._config, self._seed)
        pl_module.model.train(training)
        write_samples(self._folder.samples_at(step), texts, self._say)
        if self._remote is not None:
            self._remote.samples(step, self._config.prompts, texts)


class EarlyStop(lightning.Callback):
    """Ends training at the validation that is the ``patience``-th in a row without a score less than the best one by
    ``min_delta``.

    The score is the same number on every rank, and so is what is made of it.
    """

    def __init__(self, config: EarlyStopConfig, say: Callable[[str], None]) -> None:
        assert config.patience is not None
        self._patience, self._min_delta, self._say = config.patience, config.min_delta, say
        self._best, self._best_step, self._bad = math.inf, 0, 0

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        score = validation_score(trainer)
        if score < self._best - self._min_delta:
            self._best, self._best_step, self._bad = score, trainer.global_step, 0
        else:
            self._bad += 1
        if self._bad >= self._patience:
            trainer.should_stop = True
            unit = "bits/byte" if "val/bpb" in trainer.callback_metrics else "nats"
            self._say(
                f"early stop  step {trainer.global_step}: no better than {self._best:.4f} {unit} of step"
                f" {self._best_step} in {self._bad} validation{'s' if self._bad > 1 else ''}"
            )

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[_EARLY_STOP] = {"best": self._best, "best_step": self._best_step, "bad": self._bad}

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if (state := checkpoint.get(_EARLY_STOP)) is not None:
            self._best, self._best_step, self._bad = state["best"], state["best_step"], state["bad"]


class Gradients(lightning.Callback):
    """Hands a histogram of each layer's gradients, complete and before clipping, to the remote logger at every logged
    step."""

    def __init__(self, log_every: int, remote: Remote | None) -> None:
        self._log_every, self._remote = log_every, remote

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        step = trainer.global_step + 1  # of the update about to be made
        if self._remote is None or not (step % self._log_every == 0 or step in (1, trainer.max_steps)):
            return
        layers: dict[str, list[Tensor]] = {}
        for name, parameter in pl_module.model.named_parameters():
            if parameter.grad is not None:
                part = ".".join(name.split(".")[:2]) if name.startswith("blocks.") else name.split(".")[0]
                layers.setdefault(part, []).append(parameter.grad.detach().flatten().float())
        for part, gradients in layers.items():
            values = torch.cat(gradients)
            values = values[values.isfinite()].cpu()
            if len(values):
                counts, edges = torch.histogram(values, _BINS)
                self._remote.histogram(f"optim/gradients/{part}", counts.tolist(), edges.tolist(), step)
