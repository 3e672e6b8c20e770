"""The optimizer and the schedule of its learning rate (``optim``)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hybridlm.config.section import Pair, Section


class LRScale(Section):
    """Learning-rate multipliers by the role of a parameter (``optim.lr_scale``)."""

    matrix: float = Field(1.0, gt=0, description="of the matrices inside blocks")
    vector: float = Field(1.0, gt=0, description="of norms, biases, A_log, D and what else is no matrix")
    embedding: float = Field(1.0, gt=0, description="of the embedding, and so of a tied head")
    head: float = Field(1.0, gt=0, description="of a head with weights of its own")


class MuonConfig(Section):
    """Muon, for the matrices inside the blocks (``optim.muon``)."""

    lr: float = Field(0.02, gt=0, description="peak learning rate of the orthogonalised update")
    momentum: float = Field(0.95, ge=0, lt=1, description="share of the running gradient that is kept in a step")
    ns_steps: int = Field(5, ge=1, le=20, description="Newton-Schulz iterations")


class SGDConfig(Section):
    """Stochastic gradient descent (``optim.sgd``)."""

    momentum: float = Field(
        0.9, ge=0, lt=1, description="share of the running gradient that is kept in a step; 0: none"
    )
    nesterov: bool = Field(False, description="look ahead along the momentum; needs one")


class OptimConfig(Section):
    """The optimizer and its schedule (``optim``)."""

    name: Literal["adamw", "muon", "lion", "sgd", "adamw8bit"] = Field(
        "adamw",
        description=(
            "muon: Muon for the matrices inside blocks, AdamW for the rest; adamw8bit: moments in 8 bits, CUDA only"
        ),
    )
    lr: float = Field(3e-3, gt=0, description="peak learning rate; of AdamW, where Muon has one of its own")
    lr_scale: LRScale = LRScale()
    betas: Pair = Field(
        (0.9, 0.95), description="AdamW: decay of the first and second moment; Lion: of the update and of the momentum"
    )
    eps: float = Field(1e-8, gt=0, description="added to the denominator of AdamW's update")
    weight_decay: float = Field(0.1, ge=0, description="decoupled decay of the parameters that declare it")
    clip: float | None = Field(1.0, gt=0, description="global gradient norm; null: no clipping")
    muon: MuonConfig = MuonConfig()
    sgd: SGDConfig = SGDConfig()
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine", description="the curve after the warm-up; wsd: stable, then 1 - sqrt over the last optim.decay steps"
    )
    warmup: int | float = Field(
        0.05, ge=0, description="steps (int) or share of max_steps (float below 1) of linear warm-up"
    )
    decay: int | float = Field(
        0.2, gt=0, description="schedule=wsd: last steps (int), or share of max_steps (float below 1), that decay"
    )
    final_lr: float = Field(0.0, ge=0, le=1, description="last learning rate as a share of the peak")
