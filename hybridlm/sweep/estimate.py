"""How long a sweep takes: estimated from the plans of its jobs, and, once some of it is done, from the time which that
took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from hybridlm.config.run import RunConfig
from hybridlm.memory.plan import Plan, plan_run
from hybridlm.sweep.job import Job
from hybridlm.sweep.plan import Planned


class Work(NamedTuple):
    """A whole job. units: seconds by its plan or, where no plan knows a speed, a number in proportion to its
    arithmetic."""

    steps: int
    units: float


def plans_of(planned: Sequence[Planned]) -> dict[int, Plan]:
    """The plan of each job, by its number; those that differ in seed and rates share one. ConfigError: numbers
    clash."""
    known: dict[str, Plan] = {}
    for item in planned:
        if (shape := _shape(item.config)) not in known:
            known[shape] = plan_run(item.config)
    return {item.job.number: known[_shape(item.config)] for item in planned}


def _shape(config: RunConfig) -> str:
    rates = {"lr": 1.0, "weight_decay": 0.0}
    return repr(config.model_copy(update={"seed": 0, "optim": config.optim.model_copy(update=rates)}))


def work_of(plans: Mapping[int, Plan]) -> dict[int, Work]:
    speeds = all(plan.seconds is not None for plan in plans.values())
    return {
        number: Work(plan.max_steps, (plan.seconds if speeds else None) or plan.tokens * plan.parameters)
        for number, plan in plans.items()
    }


def planned_seconds(plans: Mapping[int, Plan], devices: int) -> float | None:
    """Of all jobs on ``devices`` that work side by side; a machine's CPU is one, however many jobs share it. None:
    unknown."""
    seconds = [plan.seconds for plan in plans.values()]
    known = [one for one in seconds if one is not None]
    return max(sum(known) / devices, *known) if known and len(known) == len(seconds) else None


def seconds_left(
    jobs: Sequence[Job], running: Mapping[int, tuple[float, int]], work: Mapping[int, Work], slots: int
) -> float | None:
    """An estimate from what is done so far; None: nothing is.

    running: number to seconds of this attempt and the step it stands at; slots: jobs at once. Jobs without ``work`` are
    not looked at.
    """
    done, spent, left = 0.0, 0.0, list[float]()
    for job in jobs:
        if job.number not in work:
            continue
        steps, units = work[job.number]
        if job.status == "finished":
            done, spent = done + units, spent + job.seconds
        elif job.number in running:
            seconds, step = running[job.number]
            share = min(step / steps, 1.0)
            done, spent = done + share * units, spent + job.seconds + seconds
            left.append((1 - share) * units)
        elif job.status == "waiting":
            left.append(units)
    if not done:
        return None
    return max(sum(left) / slots, max(left, default=0.0)) * spent / done
