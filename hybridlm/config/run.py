"""The whole configuration of a run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hybridlm.config.batch import BatchSplit
from hybridlm.config.data import DataConfig
from hybridlm.config.hardware import HardwareConfig
from hybridlm.config.kernels import KernelsConfig
from hybridlm.config.logging import CallbacksConfig, LoggerConfig
from hybridlm.config.model import ModelConfig
from hybridlm.config.optim import OptimConfig
from hybridlm.config.section import Section
from hybridlm.config.train import TrainerConfig


class SizeConfig(Section):
    """Which entry of the ``size`` group was applied; the numbers themselves are in the model section."""

    name: str = Field("default", description="set by size=...: width, depth and heads over the preset's")


class SweepConfig(Section):
    """Equal parameters or equal FLOPs for every pattern (``sweep``); docs/sweeps.md."""

    match: Literal["params", "flops"] | None = Field(
        None,
        description=(
            "params: the reference's parameters, within 1%; flops: its training FLOPs per token, within 2%; null: as"
            " written"
        ),
    )
    reference: str = Field("T", description="the pattern whose cost, at the same depth, every pattern is made to match")
    target: int | None = Field(
        None, ge=1, description="parameters, or FLOPs per token, to match instead; null: the reference's"
    )
    matched: str | None = Field(
        None, description="written by a match: what it changed; a model that has it is not matched again"
    )


class RunConfig(Section):
    """Everything a run depends on, validated. ``load_config`` makes it; nothing past it sees Hydra's DictConfig."""

    seed: int = Field(0, ge=0, le=2**32 - 1, description="seed of weights, data order and samples")
    ckpt: str | None = Field(
        None, description="null: a new run; last: resume the newest run; auto: resume if there is one; or a path"
    )
    init_from: str | None = Field(
        None, description="start a new run from these weights: last, best, a run folder, or a checkpoint"
    )
    model: ModelConfig = ModelConfig()
    size: SizeConfig = SizeConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    trainer: TrainerConfig = TrainerConfig()
    logger: LoggerConfig = LoggerConfig()
    callbacks: CallbacksConfig = CallbacksConfig()
    hardware: HardwareConfig = HardwareConfig()
    sweep: SweepConfig = SweepConfig()
    kernels: KernelsConfig = KernelsConfig()

    @property
    def batch(self) -> BatchSplit:
        """The split of a step's batch, as far as the configuration fixes it."""
        numbers = (self.data.global_batch, self.data.batch_size, self.trainer.accumulate, self.trainer.devices)
        return BatchSplit(*(None if number == "auto" else number for number in numbers))
