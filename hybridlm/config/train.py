"""The sections about the run itself: optimizer, trainer, logger, callbacks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hybridlm.config.section import Auto, Pair, Section, Strings


class LRScale(Section):
    """Learning-rate multipliers by the role of a parameter (``optim.lr_scale``)."""

    matrix: float = Field(1.0, gt=0)
    vector: float = Field(1.0, gt=0)
    embedding: float = Field(1.0, gt=0)
    head: float = Field(1.0, gt=0)


class MuonConfig(Section):
    """Muon, for the matrices inside the blocks (``optim.muon``)."""

    lr: float = Field(0.02, gt=0, description="peak learning rate of the orthogonalised update")
    momentum: float = Field(0.95, ge=0, lt=1)
    ns_steps: int = Field(5, ge=1, le=20, description="Newton-Schulz iterations")


class OptimConfig(Section):
    """The optimizer and its schedule (``optim``)."""

    name: Literal["adamw", "muon"] = Field("adamw", description="muon: Muon for the matrices inside blocks, AdamW for the rest")
    lr: float = Field(3e-3, gt=0, description="peak learning rate of AdamW")
    lr_scale: LRScale = LRScale()
    betas: Pair = Field((0.9, 0.95), description="AdamW's decay of the first and second moment")
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0, description="decoupled decay of the parameters that declare it")
    clip: float | None = Field(1.0, gt=0, description="global gradient norm; null: no clipping")
    muon: MuonConfig = MuonConfig()
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: int | float = Field(0.05, ge=0, description="steps (int) or share of max_steps (float below 1) of linear warm-up")
    final_lr: float = Field(0.0, ge=0, le=1, description="last learning rate as a share of the peak")


class TrainerConfig(Section):
    """The loop (``trainer``). Steps are optimizer steps."""

    max_steps: Auto = Field("auto", description="optimizer steps; auto: the hardware profile's")
    log_every: int = Field(20, ge=1, description="steps between logged metrics")
    val_every: int | None = Field(200, ge=1, description="steps between validations; null: only at the end")
    val_batches: int | None = Field(None, ge=1, description="micro-batches of a validation during training, spread evenly; null: all")
    ckpt_every: int = Field(200, ge=1, description="steps between checkpoints")
    keep_last: int = Field(2, ge=1, description="step checkpoints kept")
    accumulate: Auto = Field("auto", description="micro-batches per step; auto: global_batch / (batch_size x devices)")
    checkpoint_blocks: int = Field(
        0, ge=0, description="one in so many blocks keeps only its input and is computed again in the backward; 1: every block, 0: none"
    )
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    devices: Auto = Field("auto", description="processes on this node; auto: 1 on a CPU, all GPUs otherwise")
    strategy: Literal["auto", "ddp", "fsdp2"] = "auto"
    headless: bool | Literal["auto"] = Field(
        "auto", description="true: JSON lines on stdout; auto: a progress bar in a terminal, plain lines elsewhere"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of torch; null: torch's choice")


class LoggerConfig(Section):
    """Where metrics go besides metrics.jsonl and metrics.csv (``logger``)."""

    name: Literal["files", "wandb"] = "files"
    project: str = Field("hybridlm", description="W&B project")
    offline: bool = Field(True, description="W&B writes to the run folder only; `wandb sync` uploads later")


class SamplesConfig(Section):
    """Text sampled from the model (``callbacks.samples``)."""

    prompts: Strings = Field((), description="continued at the end of training and written to samples.txt")
    tokens: int = Field(80, ge=1, description="new tokens per prompt")
    temperature: float = Field(0.8, ge=0)
    top_p: float = Field(0.95, gt=0, le=1)


class CallbacksConfig(Section):
    """What happens beside the loop (``callbacks``)."""

    samples: SamplesConfig = SamplesConfig()
