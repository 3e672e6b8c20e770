"""How long a sweep takes: estimated from the plans of its jobs and, once some are done, from the time they took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hybridlm.config.run import RunConfig
from hybridlm.memory.plan import Plan, plan_run
from hybridlm.sweep.expand import PlannedJob
from hybridlm.sweep.job import Job


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


def costs_of(plans: Mapping[int, Plan]) -> dict[int, float]:
    """By job number, seconds by its plan or, if some plan knows no speed, a number proportional to its arithmetic."""
    timed = all(plan.seconds is not None for plan in plans.values())
    return {
        number: (plan.seconds if timed else None) or plan.tokens * plan.parameters for number, plan in plans.items()
    }


def planned_seconds(plans: Mapping[int, Plan], devices: int) -> float | None:
    """All jobs on ``devices`` that work in parallel; a machine's CPU is one, however many jobs share it. None:
    unknown."""
    known = [plan.seconds for plan in plans.values() if plan.seconds is not None]
    return max(sum(known) / devices, *known) if known and len(known) == len(plans) else None


def seconds_left(
    jobs: Sequence[Job], running: Mapping[int, float], costs: Mapping[int, float], slots: int
) -> float | None:
    """Estimated from the jobs finished so far; None if there are none.

    running: seconds of this attempt, by job number; slots: parallel jobs. Jobs without ``costs`` do not count.
    """
    finished = [job for job in jobs if job.status == "finished" and job.number in costs]
    if not finished:
        return None
    pace = sum(job.seconds for job in finished) / sum(costs[job.number] for job in finished)
    left = [0.0]
    for job in jobs:
        if job.number in costs and job.status in ("waiting", "running"):
            left.append(max(0.0, pace * costs[job.number] - job.seconds - running.get(job.number, 0.0)))
    return max(sum(left) / slots, *left)
