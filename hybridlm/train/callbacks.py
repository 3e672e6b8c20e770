"""The callbacks that a configuration asks for, and early stopping."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import lightning
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor

from hybridlm.config.logging import SamplesConfig
from hybridlm.config.run import RunConfig
from hybridlm.data.synthetic.source import validation_lengths
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.generate.engine import Engine
from hybridlm.generate.sampling import Sampling
from hybridlm.machine.description import Machine
from hybridlm.model.block import Block
from hybridlm.model.lm import HybridLM
from hybridlm.runs.checkpoint import EMA_KEY
from hybridlm.runs.run_folder import RunFolder
from hybridlm.train.compiled import eager
from hybridlm.train.console import Console
from hybridlm.train.lightning_module import LitLM, log_loss, model_of
from hybridlm.train.loggers import Remote
from hybridlm.train.metrics import Clock, Metrics, MetricsCallback
from hybridlm.train.router import RouterCallback, routers_of
from hybridlm.train.run_files import write_or_warn
from hybridlm.train.validation import InContextProbes, TaskAccuracy


def metering_callbacks(
    config: RunConfig, machine: Machine, model: HybridLM, tokenizer: Tokenizer, console: Console, clock: Clock
) -> tuple[list[RouterCallback], MetricsCallback]:
    """The one for routers, if there are any, and the one for metrics, which asks the first. ``clock`` is the trainer's
    profiler."""
    layers = routers_of(model)
    routers = [RouterCallback(layers, config.trainer.log_every, console.say)] if layers else []

    def more(trainer: lightning.Trainer) -> Metrics:
        declared = {
            f"/{layer}/".join(name.split("/")): float(value)  # group/LAYER/name
            for layer, block in enumerate(model.blocks)
            for name, value in cast(Block, block).mixer.metrics().items()
        }
        return (routers[0].metrics(trainer) if routers else {}) | declared

    token_bytes = torch.from_numpy(tokenizer.token_bytes()).long()
    return routers, MetricsCallback(config, machine, model, token_bytes, clock, more)


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
        monitor = "val/loss" if synthetic or config.optim.objective == "dpo" else "val/bpb"
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


class EMA(lightning.Callback):
    """``average += (1 - d) * (weights - average)`` after each optimizer step, where d is ``decay``, or (1 + step) / (10
    + step) while that is less, so that the initial weights are forgotten quickly.

    The average depends only on the weights and the step, so a resumed run has the one it would have had. It is in the
    checkpoint under a key of its own, not among the callbacks' states, so that a run can be resumed without it and
    other readers find it. (Lightning's WeightAveraging validates the average only and saves it in the model's place.)
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._model: HybridLM | None = None
        self._loaded: dict[str, Tensor] | None = None
        self._step = 0
        self._val = torch.empty(0)  # sums of the running validation, as from the objective

    def _average(self, module: lightning.LightningModule) -> HybridLM:
        """Begins with the weights of ``module``, or with the averages of a checkpoint."""
        if self._model is None:
            self._model = copy.deepcopy(model_of(module)).float().eval().requires_grad_(False)
            if self._loaded is not None:
                for name, parameter in self._model.named_parameters():
                    parameter.copy_(self._loaded[name])
            self._loaded = None
        return self._model

    def restore(self, averages: dict[str, Tensor] | None) -> None:
        """Takes the averages of a checkpoint, which has them under ``EMA_KEY``."""
        self._model, self._loaded = None, averages

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._step = trainer.global_step
        self._average(pl_module)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        keep = min(self._decay, (1 + self._step) / (10 + self._step))
        weights = [weight.detach().float() for weight in model_of(pl_module).parameters()]
        torch._foreach_lerp_(list(self._average(pl_module).parameters()), weights, 1 - keep)

    def on_validation_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._val = torch.zeros(1, dtype=torch.float64, device=pl_module.device)
        for ours, current in zip(self._average(pl_module).buffers(), model_of(pl_module).buffers(), strict=True):
            ours.copy_(current)  # a router's selection bias is not averaged

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if dataloader_idx == 0:
            with trainer.precision_plugin.val_step_context():
                self._val = self._val + cast(LitLM, pl_module).objective.sums(self._average(pl_module), batch)

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        log_loss(pl_module, self._val[:3], "val/ema_")

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        averages = self._average(pl_module).named_parameters()
        checkpoint[EMA_KEY] = {name: parameter.detach() for name, parameter in averages}

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.restore(checkpoint.get(EMA_KEY))


def sampled(model: HybridLM, tokenizer: Tokenizer, config: SamplesConfig, seed: int) -> list[str]:
    """Each prompt with its continuation. The model must be in evaluation mode."""
    sampling = Sampling(
        temperature=config.temperature,
        top_p=config.top_p,
        seed=seed,
        stop_ids=(tokenizer.eos_id,),
        max_new_tokens=config.tokens,
    )
    written = Engine(model, tokenizer).generate([tokenizer.encode(prompt) for prompt in config.prompts], sampling)
    return [prompt + completion.text for prompt, completion in zip(config.prompts, written, strict=True)]


def write_samples(path: Path, texts: Sequence[str], say: Callable[[str], None]) -> None:
    """``say`` prints a line on the first rank if it fails."""
    write_or_warn(path, "\n\n----------------\n\n".join(texts) + "\n", say)


class SampleText(lightning.Callback):
    """Continues the prompts after every validation whose step ``interval`` divides, into samples/step-00000100.txt.
    Runs on rank 0 only."""

    def __init__(
        self,
        config: SamplesConfig,
        seed: int,
        interval: int,
        tokenizer: Tokenizer,
        folder: RunFolder,
        remote: Remote,
        say: Callable[[str], None],
    ) -> None:
        self._config, self._seed, self._interval, self._say = config, seed, interval, say
        self._tokenizer, self._folder, self._remote = tokenizer, folder, remote

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        step, model = trainer.global_step, model_of(pl_module)
        if trainer.state.fn != "fit" or step % self._interval != 0 or not trainer.is_global_zero:
            return
        with eager(model):  # the cache grows with every token
            texts = sampled(model, self._tokenizer, self._config, self._seed)
        write_samples(self._folder.samples_at(step), texts, self._say)
        self._remote.samples(step, self._config.prompts, texts)
