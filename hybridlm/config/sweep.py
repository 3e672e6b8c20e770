"""The sweep section: how the models of different patterns are made comparable."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hybridlm.config.section import Section


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
