"""The logger and callbacks sections."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from hybridlm.config.section import Section, Strings, to_tuple

# What W&B accepts; it would refuse the others only once the run logs or uploads.
_Address = Annotated[str, Field(max_length=128, pattern=r"^[^/\\#?%:]+$")]  # a part of the run's URL
_Name = Annotated[str, Field(min_length=1, max_length=128)]
_Short = Annotated[str, Field(min_length=1, max_length=64)]


class LoggerConfig(Section):
    """Where metrics are logged besides metrics.jsonl and metrics.csv (``logger``)."""

    name: Literal["files", "wandb", "tensorboard"] = Field(
        "files", description="set by logger=...; files: the run folder only; wandb, tensorboard: there, too"
    )
    project: _Address = Field("hybridlm", description="W&B project")
    entity: _Address | None = Field(None, description="W&B user or team; null: the default of the API key")
    group: _Name | None = Field(None, description="W&B group; null: in a sweep the name of its folder")
    job_type: _Short | None = Field(None, description="W&B job type; null: train, or sweep in a sweep")
    tags: Annotated[tuple[_Short, ...], BeforeValidator(to_tuple)] = Field((), description="W&B tags")
    run_name: _Name | None = Field(None, description="W&B display name; null: the model's name and the run folder's")
    offline: bool = Field(True, description="W&B writes to the run folder only; `wandb sync` uploads later")
    timeout: float = Field(
        20.0,
        gt=0,
        description=(
            "seconds that an online W&B run waits for the network: at the start, before it goes offline, and at the end"
        ),
    )


class SamplesConfig(Section):
    """Text sampled from the model (``callbacks.samples``)."""

    prompts: Strings = Field((), description="prompts to continue at the end of training, for samples.txt")
    every: int | None = Field(
        None, ge=1, description="also after every n-th validation, to samples/; null: only at the end"
    )
    tokens: int = Field(80, ge=1, description="new tokens per prompt")
    temperature: float = Field(0.8, ge=0, description="sampling temperature; 0: greedy")
    top_p: float = Field(
        0.95, gt=0, le=1, description="sample from the smallest set of tokens with this much probability"
    )


class EMAConfig(Section):
    """A running average of the weights (``callbacks.ema``)."""

    decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description=("decay per step, lower in the first steps; validated as val/ema_bpb; null: no average"),
    )


class EarlyStopConfig(Section):
    """Early stopping (``callbacks.early_stop``)."""

    patience: int | None = Field(
        None,
        ge=1,
        description=(
            "validations without improvement of val/bpb (synthetic tasks: val/loss) before training stops; null: never"
        ),
    )
    min_delta: float = Field(0.0, ge=0, description="smallest improvement that counts, in bits per byte (nats)")


class ProbesConfig(Section):
    """Probes of in-context recall during training (``callbacks.probes``)."""

    every: int | None = Field(
        None,
        ge=1,
        description="after every n-th validation: induction and copying, logged as probe/...; null: never",
    )
    examples: int = Field(32, ge=1, description="examples per probe, of random tokens of the model's vocabulary")
    length: int = Field(128, ge=32, description="tokens per example")


class CallbacksConfig(Section):
    """What happens during training besides the optimizer steps (``callbacks``)."""

    samples: SamplesConfig = SamplesConfig()
    ema: EMAConfig = EMAConfig()
    early_stop: EarlyStopConfig = EarlyStopConfig()
    probes: ProbesConfig = ProbesConfig()
