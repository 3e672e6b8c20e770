"""The plan of a run that is about to start: what it chooses in the place of ``auto``, or why the run is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybridlm.config.section import ConfigError
from hybridlm.memory.plan import Plan, plan_run
from hybridlm.memory.report import refusal
from hybridlm.memory.suggest import suggestions

if TYPE_CHECKING:
    from hybridlm.config.run import RunConfig
    from hybridlm.train.resumed import Resumed


def planned(config: RunConfig, resumed: Resumed | None) -> Plan:
    """The plan of ``config``, or of what it is in a run that is resumed. ConfigError: it does not fit; with changes that would."""
    settled = config if resumed is None else resumed.settle(config)
    plan = plan_run(settled)
    if not plan.fits:
        raise ConfigError(refusal(plan, suggestions(settled, plan)))
    return plan
