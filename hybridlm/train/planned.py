"""The plan of a run that is about to start: what it chooses in place of ``auto``, or why the run is refused."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hybridlm.errors import ConfigError
from hybridlm.memory.plan import Plan, Planner
from hybridlm.memory.report import refusal
from hybridlm.memory.suggest import suggestions
from hybridlm.train.resumed import Resumed

if TYPE_CHECKING:
    from hybridlm.config.run import RunConfig
    from hybridlm.model.lm import HybridLM


class Start(NamedTuple):
    """What a run starts from: its plan, the model on "meta" that was planned, and the checkpoint it resumes from."""

    plan: Plan
    model: HybridLM
    resumed: Resumed | None


def planned(config: RunConfig, checkpoint: Path | None, *, verified: bool = False) -> Start:
    """The plan of ``config``, or of a run of it that resumes from ``checkpoint``. verified: its checksum was verified
    just now. ConfigError: the run does not fit; with changes that would."""
    resumed = None if checkpoint is None else Resumed.read(checkpoint, config, verified=verified)
    settled = config if resumed is None else resumed.settle(config)
    planner = Planner(settled, None if resumed is None else resumed.model)
    plan = planner.plan()
    if not plan.fits:
        raise ConfigError(refusal(plan, suggestions(settled, plan)))
    return Start(plan, planner.steps.model, resumed)
