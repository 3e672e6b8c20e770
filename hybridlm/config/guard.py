"""What happens when a step goes wrong (``trainer.guard``)."""

from __future__ import annotations

from pydantic import Field

from hybridlm.config.section import Section


class GuardConfig(Section):
    """Steps whose loss or gradient is not finite are always skipped; this says what follows (``trainer.guard``)."""

    rollback_after: int = Field(
        3, ge=1, description="skipped steps in a row after which the last good checkpoint is loaded again"
    )
    lr_factor: float = Field(0.5, gt=0, le=1, description="of every learning rate, from a rollback on")
    max_rollbacks: int = Field(
        2, ge=0, description="rollbacks of a run; where one more would be needed it stops with a report"
    )
    spike_sigma: float | None = Field(
        None,
        gt=0,
        description=(
            "skip a step whose loss is so many standard deviations above the mean of the last ones; null: never"
        ),
    )
    spike_window: int = Field(
        100, ge=2, description="good steps whose losses that mean is taken of; before there are as many none is skipped"
    )
