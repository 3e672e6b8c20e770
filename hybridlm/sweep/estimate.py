"""How long a sweep takes: estimated from the plans of its jobs and, once some are done, from the time they took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from hybridlm.config.run import RunConfig
from hybridlm.memory.plan import Plan, plan_run
from hybridlm.sweep.expand import PlannedJob
from hybridlm.sweep.job import Job


class JobCost(NamedTuple):
    """cost: seconds by the plan of the job or, if some plan knows no speed, a number proportional to its arithmetic."""

    steps: int
    cost: float


def plans_of(planned: Sequence[PlannedJob]) -> dict[int, Plan]:
    """The plan of each job by its number; jobs that differ only in seed, learning rate and weight decay share one.
    ConfigError: the settings of a job conflict."""
    known: dict[str, Plan] = {}
    plans = {}
    for job, config in planned:
        shape = _shape(config)
        known[shape] = known.get(shape) or plan_run(config)
        plans[job.number] = known[shape]
    return plans


def _shape(config: RunConfig) -> str:
    optim = config.optim.model_copy(update={"lr": 1.0, "weight_decay": 0.0})
    return repr(config.model_copy(update={"seed": 0, "optim": optim}))


def costs_of(plans: Mapping[int, Plan]) -> dict[int, JobCost]:
    timed = all(plan.seconds is not None for plan in plans.values())
    return {
        number: JobCost(plan.max_steps, (plan.seconds if timed else None) or plan.tokens * plan.parameters)
        for number, plan in plans.items()
    }


def planned_seconds(plans: Mapping[int, Plan], devices: int) -> float | None:
    """All jobs on ``devices`` that work in parallel; a machine's CPU is one, however many jobs share it. None:
    unknown."""
    known = [plan.seconds for plan in plans.values() if plan.seconds is not None]
    return max(sum(known) / devices, *known) if known and len(known) == len(plans) else None


def seconds_left(
    jobs: Sequence[Job], running: Mapping[int, tuple[float, int]], costs: Mapping[int, JobCost], slots: int
) -> float | None:
    """An estimate from what is done so far; None: nothing is.

    running: seconds of this attempt and current step, by job number; slots: parallel jobs. Jobs without ``costs`` do
    not count.
    """
    done, spent, left = 0.0, 0.0, [0.0]
    for job in (job for job in jobs if job.number in costs):
        steps, cost = costs[job.number]
        seconds, step = running.get(job.number, (0.0, steps if job.status == "finished" else 0))
        share = min(step / steps, 1.0)
        if job.status == "finished" or job.number in running:
            done, spent = done + share * cost, spent + job.seconds + seconds
        if job.status == "waiting" or job.number in running:
            left.append((1 - share) * cost)
    return max(sum(left) / slots, *left) * spent / done if done else None
