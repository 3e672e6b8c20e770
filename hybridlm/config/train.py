"""The sections about the run itself: optimizer and trainer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hybridlm.config.guard import GuardConfig
from hybridlm.config.section import Auto, Section


class TrainerConfig(Section):
    """The loop (``trainer``). Steps are optimizer steps."""

    max_steps: Auto = Field("auto", description="optimizer steps; auto: the hardware profile's")
    log_every: int = Field(20, ge=1, description="steps between logged metrics")
    val_every: int | None = Field(200, ge=1, description="steps between validations; null: only at the end")
    val_batches: int | None = Field(
        None, ge=1, description="micro-batches of a validation during training, spread evenly; null: all"
    )
    ckpt_every: int = Field(200, ge=1, description="steps between checkpoints")
    keep_last: int = Field(2, ge=1, description="step checkpoints kept")
    keep_best: int = Field(1, ge=0, description="checkpoints kept of the validations with the fewest bits per byte")
    async_checkpoints: bool = Field(
        False,
        description=(
            "training goes on from a copy of the state in memory, while a thread writes it; one write at a time"
        ),
    )
    time_limit: str | float | None = Field(
        None,
        description=(
            "of this start, as '1:30:00', 90m or 2h; at the step after it the run saves and ends, to be resumed; null:"
            " none"
        ),
    )
    requeue: bool = Field(
        False, description="in a job of SLURM, when SIGUSR1 stopped the run: have the job started again"
    )
    accumulate: Auto = Field("auto", description="micro-batches per step; auto: the fewest that fit the memory")
    checkpoint_blocks: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description=(
            "one in so many blocks keeps only its input and is computed again in the backward; 1: every block, 0: none;"
            " auto: what fits the memory at the least cost"
        ),
    )
    loss_rows: Auto = Field(
        "auto", description="rows of logits that exist at once in the loss; auto: what fits the memory"
    )
    compile: bool = Field(
        False, description="torch compiles each block: seconds to minutes at the start, then faster steps"
    )
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"] = Field(
        "auto",
        description=(
            "bf16-true: weights in bfloat16 too, but for those that must not be rounded (A_log, D, dt_bias, routers);"
            " 64-true: to compare runs without rounding in the way"
        ),
    )
    guard: GuardConfig = GuardConfig()
    devices: Auto = Field("auto", description="processes on this node; auto: 1 on a CPU, all GPUs otherwise")
    strategy: Literal["auto", "ddp", "fsdp2"] = Field(
        "auto",
        description=(
            "of several processes; ddp: each holds the whole model; fsdp2: weights and moments are shared out;"
            " auto: ddp"
        ),
    )
    headless: bool | Literal["auto"] = Field(
        "auto", description="true: JSON lines on stdout; auto: a progress bar in a terminal, plain lines elsewhere"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of torch; null: torch's choice")
