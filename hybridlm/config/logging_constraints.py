"""What must hold between loggers, callbacks and the loop."""

from __future__ import annotations

from hybridlm.config.logging import CallbacksConfig, LoggerConfig
from hybridlm.config.train import TrainerConfig


def logging_problems(logger: LoggerConfig, callbacks: CallbacksConfig, trainer: TrainerConfig) -> list[str]:
    """One line for each rule that is broken."""
    asked = {
        "callbacks.samples.every": callbacks.samples.every,
        "callbacks.ema.decay": callbacks.ema.decay,
        "callbacks.early_stop.patience": callbacks.early_stop.patience,
        "callbacks.probes.every": callbacks.probes.every,
        "logger.gradients": logger.gradients or None,
    }
    sharded = ("callbacks.samples.every", "callbacks.ema.decay", "logger.gradients")
    by_validation = ("callbacks.samples.every", "callbacks.early_stop.patience", "callbacks.probes.every")
    problems = [
        f"{name} = {str(asked[name]).lower()}: needs whole weights, which trainer.strategy = 'fsdp2' shards; take strategy=ddp or leave it"
        for name in sharded
        if asked[name] is not None and trainer.strategy == "fsdp2"
    ]
    problems += [
        f"{name} = {asked[name]}: counts validations and trainer.val_every is null; give it a number of steps"
        for name in by_validation
        if asked[name] is not None and trainer.val_every is None
    ]
    for name, on in (("gradients", logger.gradients), ("expert_load", logger.expert_load)):
        if on and logger.name == "files":
            problems.append(f"logger.{name} = true: histograms are for logger=wandb and logger=tensorboard, this is logger=files")
    return problems
