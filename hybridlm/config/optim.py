"""The optimizer and the schedule of its learning rate (``optim``)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from hybridlm.config.section import Section, to_tuple

_Beta = Annotated[float, Field(ge=0, lt=1)]


class LRScale(Section):
    """Learning-rate multipliers by the role of a parameter (``optim.lr_scale``)."""

    matrix: float = Field(1.0, gt=0, description="for the matrices inside blocks")
    vector: float = Field(1.0, gt=0, description="for norms, biases, A_log, D and everything else that is not a matrix")
    embedding: float = Field(1.0, gt=0, description="for the embedding, and thus for a tied head")
    head: float = Field(1.0, gt=0, description="for an untied head")


class MuonConfig(Section):
    """Muon, for the matrices inside the blocks (``optim.muon``)."""

    lr: float = Field(0.02, gt=0, description="peak learning rate of the orthogonalised update")
    momentum: float = Field(0.95, ge=0, lt=1, description="momentum of the gradient")
    ns_steps: int = Field(5, ge=1, le=20, description="Newton-Schulz iterations")


class SGDConfig(Section):
    """Stochastic gradient descent (``optim.sgd``)."""

    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of the gradient; 0: none")
    nesterov: bool = Field(False, description="Nesterov momentum")


class OptimConfig(Section):
    """The optimizer and its schedule (``optim``)."""

    objective: Literal["next_token", "dpo"] = Field(
        "next_token",
        description=(
            "next_token: cross-entropy; dpo: direct preference optimisation, for data.format=preferences"
            " (docs/finetuning.md)"
        ),
    )
    dpo_beta: float = Field(
        0.1,
        gt=0,
        description="dpo: how strongly the model is held to the weights it starts from; lower lets it move further",
    )
    name: Literal["adamw", "muon", "lion", "sgd", "adamw8bit"] = Field(
        "adamw",
        description=(
            "muon: Muon for the matrices inside blocks, AdamW for the rest; adamw8bit: moments in 8 bits, CUDA only"
        ),
    )
    lr: float = Field(3e-3, gt=0, description="peak learning rate; with optim=muon that of AdamW")
    lr_scale: LRScale = LRScale()
    betas: Annotated[tuple[_Beta, _Beta], BeforeValidator(to_tuple)] = Field(
        (0.9, 0.95), description="AdamW: decay of first and second moment; Lion: of update and momentum"
    )
    eps: float = Field(1e-8, gt=0, description="epsilon in the denominator of AdamW's update")
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay, for parameters that take it")
    clip: float | None = Field(1.0, gt=0, description="maximum global gradient norm; null: no clipping")
    muon: MuonConfig = MuonConfig()
    sgd: SGDConfig = SGDConfig()
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine", description="the curve after the warm-up; wsd: stable, then 1 - sqrt over the last optim.decay steps"
    )
    warmup: int | float = Field(
        0.05, ge=0, description="linear warm-up: steps (int) or share of max_steps (float below 1)"
    )
    decay: int | float = Field(
        0.2, gt=0, description="schedule=wsd: length of the decay, steps (int) or share of max_steps (float below 1)"
    )
    final_lr: float = Field(0.0, ge=0, le=1, description="final learning rate, relative to the peak")
