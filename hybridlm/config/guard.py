"""Recovery from bad steps (``trainer.guard``)."""

from __future__ import annotations

from pydantic import Field

from hybridlm.config.section import Section


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
