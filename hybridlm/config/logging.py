"""The sections about what a run tells of itself: loggers, and what happens beside the loop."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hybridlm.config.section import Section, Strings


class LoggerConfig(Section):
    """Where metrics go besides metrics.jsonl and metrics.csv (``logger``)."""

    name: Literal["files", "wandb", "tensorboard"] = Field(
        "files", description="set by logger=...: files: the run folder's alone; wandb, tensorboard: there, too"
    )
    project: str = Field("hybridlm", min_length=1, description="W&B project")
    entity: str | None = Field(None, description="W&B user or team; null: the one of the key")
    group: str | None = Field(None, description="W&B group; null: in a sweep the name of its folder")
    job_type: str | None = Field(None, description="W&B job type; null: train, or sweep in a sweep")
    tags: Strings = Field((), description="W&B tags")
    run_name: str | None = Field(None, description="W&B display name; null: the model's name and the run folder's")
    offline: bool = Field(True, description="W&B writes to the run folder only; `wandb sync` uploads later")
    timeout: float = Field(
        20.0,
        gt=0,
        description=(
            "seconds that an online W&B run may wait for the network when it begins, before it goes offline, and at"
            " its end"
        ),
    )


class SamplesConfig(Section):
    """Text sampled from the model (``callbacks.samples``)."""

    prompts: Strings = Field((), description="continued at the end of training and written to samples.txt")
    every: int | None = Field(
        None, ge=1, description="also after every so many validations, to samples/; null: only at the end"
    )
    tokens: int = Field(80, ge=1, description="new tokens per prompt")
    temperature: float = Field(0.8, ge=0, description="of the sampling; 0: always the likeliest token")
    top_p: float = Field(
        0.95, gt=0, le=1, description="sample from the likeliest tokens that hold this probability together"
    )


class EMAConfig(Section):
    """A running average of the weights (``callbacks.ema``)."""

    decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description=(
            "share of the average kept in a step, less in the first ones; validated as val/ema_bpb; null: no average"
        ),
    )


class EarlyStopConfig(Section):
    """The end of a run that no longer gets better (``callbacks.early_stop``)."""

    patience: int | None = Field(
        None,
        ge=1,
        description=(
            "validations without a better val/bpb (a synthetic task: val/loss) after which training ends; null: never"
        ),
    )
    min_delta: float = Field(
        0.0, ge=0, description="bits per byte (nats) by which a validation has to be better to count"
    )


class ProbesConfig(Section):
    """Can the text model find again what it has just read? (``callbacks.probes``)."""

    every: int | None = Field(
        None,
        ge=1,
        description="after every so many validations: induction and copying, logged as probe/...; null: never",
    )
    examples: int = Field(32, ge=1, description="of each probe, made of random tokens of the model's own vocabulary")
    length: int = Field(128, ge=32, description="tokens of an example")


class CallbacksConfig(Section):
    """What happens beside the loop (``callbacks``)."""

    samples: SamplesConfig = SamplesConfig()
    ema: EMAConfig = EMAConfig()
    early_stop: EarlyStopConfig = EarlyStopConfig()
    probes: ProbesConfig = ProbesConfig()
