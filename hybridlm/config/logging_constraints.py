"""What must hold between loggers, callbacks and the loop."""

from __future__ import annotations

from hybridlm.config.logging import CallbacksConfig, LoggerConfig
from hybridlm.config.problems import show
from hybridlm.config.train import TrainerConfig

_NOT_IN_ADDRESSES = "/ \\ # ? % :"  # of W&B


def logging_problems(logger: LoggerConfig, callbacks: CallbacksConfig, trainer: TrainerConfig) -> list[str]:
    """One line for each rule that is broken."""
    asked = {
        "callbacks.samples.every": callbacks.samples.every,
        "callbacks.ema.decay": callbacks.ema.decay,
        "callbacks.early_stop.patience": callbacks.early_stop.patience,
        "callbacks.probes.every": callbacks.probes.every,
    }
    sharded = ("callbacks.samples.every", "callbacks.ema.decay")
    by_validation = ("callbacks.samples.every", "callbacks.early_stop.patience", "callbacks.probes.every")
    problems = [
        f"{name} = {str(asked[name]).lower()}: needs whole weights, which trainer.strategy = 'fsdp2' shards; take"
        " strategy=ddp or leave it"
        for name in sharded
        if asked[name] is not None and trainer.strategy == "fsdp2"
    ]
    problems += [
        f"{name} = {asked[name]}: counts validations and trainer.val_every is null; give it a number of steps"
        for name in by_validation
        if asked[name] is not None and trainer.val_every is None
    ]
    return problems + (_wandb_problems(logger) if logger.name == "wandb" else [])


def _wandb_problems(logger: LoggerConfig) -> list[str]:
    """What W&B would refuse when the run begins to log, or when it is uploaded."""
    path = (("project", logger.project), ("entity", logger.entity))  # parts of the run's address
    names = (*path, ("group", logger.group), ("job_type", logger.job_type), ("run_name", logger.run_name))
    longest = {"job_type": 64}
    problems = [
        f"logger.{field} = {show(name)}: legal are 1 to {most} characters, this has {len(name)}"
        for field, name in names
        if name is not None and not 1 <= len(name) <= (most := longest.get(field, 128))
    ]
    problems += [
        f"logger.{field} = {show(name)}: legal are characters other than {_NOT_IN_ADDRESSES}, this has"
        f" {' '.join(sorted(wrong))}"
        for field, name in path
        if name is not None and (wrong := set(name).intersection(_NOT_IN_ADDRESSES.split()))
    ]
    return problems + [
        f"logger.tags = {show(logger.tags)}: legal are tags of 1 to 64 characters, {show(tag)} has {len(tag)}"
        for tag in logger.tags
        if not 1 <= len(tag) <= 64
    ]
