"""The trainer section: the training loop."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hybridlm.config.section import Auto, Section


class GuardConfig(Section):
    """Steps with a non-finite loss or gradient are always skipped; these say what follows (``trainer.guard``)."""

    rollback_after: int = Field(
        3, ge=1, description="consecutive skipped steps before rolling back to the last good checkpoint"
    )
    lr_factor: float = Field(0.5, gt=0, le=1, description="factor on every learning rate after a rollback")
    max_rollbacks: int = Field(2, ge=0, description="maximum rollbacks of a run; then it stops with a report")
    spike_sigma: float | None = Field(
        None,
        gt=0,
        description=("skip a step whose loss is this many standard deviations above the recent mean; null: never"),
    )
    spike_window: int = Field(
        100, ge=2, description="good steps in that mean; no step is skipped until there are this many"
    )


class TrainerConfig(Section):
    """The training loop (``trainer``). Steps are optimizer steps."""

    max_steps: Auto = Field("auto", description="optimizer steps; auto: the hardware profile's")
    log_every: int = Field(20, ge=1, description="steps between logged metrics")
    val_every: int | None = Field(200, ge=1, description="steps between validations; null: only at the end")
    val_batches: int | None = Field(
        None, ge=1, description="micro-batches of a validation during training, spread evenly; null: all"
    )
    ckpt_every: int = Field(200, ge=1, description="steps between checkpoints")
    keep_last: int = Field(2, ge=1, description="step checkpoints kept")
    keep_best: int = Field(1, ge=0, description="checkpoints kept of the best validations, by bits per byte")
    async_checkpoints: bool = Field(
        False,
        description=("training continues while a thread writes a copy of the state in memory; one write at a time"),
    )
    time_limit: str | float | None = Field(
        None,
        description=(
            "time limit of this start ('1:30:00', 90m, 2h), after which the run saves a checkpoint and ends; null: none"
        ),
    )
    requeue: bool = Field(False, description="requeue the SLURM job when SIGUSR1 stopped the run")
    accumulate: Auto = Field(
        "auto", description="micro-batches per step and device; auto: the fewest that fit in memory"
    )
    checkpoint_blocks: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description=(
            "activation checkpointing of every n-th block; 1: all, 0: none; auto: the cheapest that fits in memory"
        ),
    )
    loss_rows: Auto = Field("auto", description="rows of logits per chunk of the loss; auto: what fits in memory")
    compile: bool = Field(
        False, description="torch.compile each block: takes seconds to minutes, then steps are faster"
    )
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"] = Field(
        "auto",
        description=(
            "bf16-true: bfloat16 weights, too, except A_log, D, dt_bias and routers; 64-true: to compare runs without"
            " rounding errors"
        ),
    )
    guard: GuardConfig = GuardConfig()
    devices: Auto = Field("auto", description="processes on this node; auto: 1 on a CPU, all GPUs otherwise")
    strategy: Literal["auto", "ddp", "fsdp2"] = Field(
        "auto",
        description=(
            "for several processes; ddp: each has the whole model; fsdp2: weights and optimizer state are sharded;"
            " auto: ddp"
        ),
    )
    headless: bool | Literal["auto"] = Field(
        "auto", description="true: JSON lines on stdout; auto: a progress bar in a terminal, plain lines elsewhere"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of torch; null: torch's default")
