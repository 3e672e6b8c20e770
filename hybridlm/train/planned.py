"""The plan of a run that is about to start: what it chooses in the place of ``auto``, or why the run is refused."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hybridlm.errors import ConfigError
from hybridlm.memory.plan import Plan, plan_run
from hybridlm.memory.report import refusal
from hybridlm.memory.suggest import suggestions
from hybridlm.train.resumed import Resumed

if TYPE_CHECKING:
    from hybridlm.config.run import RunConfig


class Start(NamedTuple):
    """What a run starts from: its plan, and the checkpoint that it goes on from."""

    plan: Plan
    resumed: Resumed | None


def planned(config: RunConfig, resume: Path | None) -> Start:
    """The plan of ``config``, or of what it is in the run that goes on from the checkpoint ``resume``. ConfigError: it
    does not fit; with changes that would."""
    resumed = None if resume is None else Resumed.read(resume, config)
    settled = config if resumed is None else resumed.settle(config)
    plan = plan_run(settled)
    if not plan.fits:
        raise ConfigError(refusal(plan, suggestions(settled, plan)))
    return Start(plan, resumed)
