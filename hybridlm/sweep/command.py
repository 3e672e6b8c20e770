"""``hybridlm sweep``: from arguments to a runner."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import chdir
from datetime import datetime
from pathlib import Path

from hybridlm.config.duration import roughly
from hybridlm.config.overrides import value_of
from hybridlm.errors import ConfigError, UserError
from hybridlm.machine.device import CPU, visible_gpus
from hybridlm.machine.launcher import launch
from hybridlm.memory.plan import Plan
from hybridlm.memory.report import refusal
from hybridlm.sweep.estimate import planned_seconds, plans_of, work_of
from hybridlm.sweep.grid import Axis
from hybridlm.sweep.job import create, find, refuse_taken
from hybridlm.sweep.plan import Compose, Planned, depth_warning, plan
from hybridlm.sweep.runner import Environment, Runner

Axes = Callable[[Sequence[str]], list[Axis]]


def new_sweep(
    overrides: Sequence[str], *, seeds: int, jobs: int | None, dry_run: bool, axes: Axes, compose: Compose
) -> int:
    """Plans a sweep, and runs it unless it is only to be shown. The exit code.

    seeds: per point; jobs: at once, None: one per GPU, or one; axes: the grid of some overrides; compose: the
    configuration of some. ConfigError: anything that is wrong with any point, before the first one starts.
    """
    if launch() is not None:
        raise UserError("sweep: under a launcher each process would run the whole sweep; start it without one")
    grid, gpus = axes(overrides), visible_gpus()
    folder = _folder([line for axis in grid for line in axis.values])
    refuse_taken(folder)
    planned = plan(grid, seeds, compose, gpu=bool(gpus) or dry_run, group=folder.name)
    if (warning := depth_warning(planned)) is not None:
        print(warning, file=sys.stderr)
    slots = _slots(planned, gpus, jobs)
    plans = plans_of(planned)
    total = planned_seconds(plans, len({slot.get("CUDA_VISIBLE_DEVICES") for slot in slots}))
    about = "" if total is None else f", about {roughly(total)} by estimate"
    if dry_run:
        _list(planned, plans, len(slots), about)
        return 0
    if wrong := [f"{item.job.name}: {problem}" for item in planned for problem in _too_large(plans[item.job.number])]:
        raise ConfigError(wrong)
    varied = [axis.key for axis in grid if axis.varied and axis.key != "seed"]
    options = (["--seeds", str(seeds)] if seeds > 1 else []) + (["--jobs", str(jobs)] if jobs else [])
    command = shlex.join(["hybridlm", "sweep", *overrides, *options])
    sweep = create(folder, [item.job for item in planned], overrides, varied, command)
    print(f"sweep     {len(planned)} jobs, {len(slots)} at once{about}, in {folder}", flush=True)
    return Runner(sweep, slots, work_of(plans)).run()


def resume_sweep(name: str, *, jobs: int | None, compose: Compose) -> int:
    """Goes on with the sweep in a folder, or the ``last`` one: with what is not finished. The exit code. ConfigError:
    it cannot."""
    sweep = find(name)
    left = [job for job in sweep.read() if job.status != "finished"]
    with chdir(sweep.cwd):  # where the jobs' relative paths start from
        planned = [Planned(job, compose(job.overrides)) for job in left]
    print(f"sweep     {len(left)} of {len(sweep.jobs)} jobs are not finished, in {sweep.folder}", flush=True)
    return Runner(sweep, _slots(planned, visible_gpus(), jobs), work_of(plans_of(planned))).run()


def _folder(overrides: Sequence[str]) -> Path:
    named = value_of(overrides, "hydra.sweep.dir")
    if named is not None and "${" in named:
        raise ConfigError(f"hydra.sweep.dir = {named!r}: a plain path here, without ${{...}}")
    now = datetime.now()
    return Path(named) if named else Path("multirun") / now.strftime("%Y-%m-%d") / now.strftime("%H-%M-%S-%f")


def _slots(planned: Sequence[Planned], gpus: Sequence[str], jobs: int | None) -> list[Environment]:
    """The environment of each of the jobs that run at once: a share of the GPUs (as many as the job with most devices
    needs), or of the cores. ConfigError: a job needs more GPUs than there are."""
    on_gpu = bool(gpus) and any(item.config.hardware.accelerator != CPU for item in planned)
    devices = [item.config.trainer.devices for item in planned]
    most = max((number for number in devices if isinstance(number, int)), default=1)
    if on_gpu and most > len(gpus):
        raise ConfigError(f"trainer.devices = {most}: this machine has {len(gpus)}")
    shares = [gpus[i : i + most] for i in range(0, len(gpus) - most + 1, most)] if on_gpu else []
    count = max(1, min(jobs or len(shares) or 1, len(planned)))  # a slot without a job would take cores from the others
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = os.environ.get("OMP_NUM_THREADS", "")
    threads = max(1, min(cores // count, int(limit) if limit.isdecimal() and int(limit) else cores))
    return [
        {"OMP_NUM_THREADS": str(threads)}
        | ({"CUDA_VISIBLE_DEVICES": ",".join(shares[i % len(shares)])} if shares else {})
        for i in range(count)
    ]


def _too_large(plan: Plan) -> list[str]:
    return [] if plan.fits else [refusal(plan, [])[0]]


def _list(planned: Sequence[Planned], plans: Mapping[int, Plan], at_once: int, about: str) -> None:
    """A line per job: parameters, the memory that its plan needs, the time that it takes, and the match."""
    width = max(len(item.job.name) for item in planned)
    for item in planned:
        plan = plans[item.job.number]
        memory = f"{plan.reserved_bytes / 2**30:.2f} GiB{'' if plan.fits else ', DOES NOT FIT'}"
        time = "" if plan.seconds is None else f"  {roughly(plan.seconds)}"
        note = f"  {item.config.sweep.matched}" if item.config.sweep.matched else ""
        print(f"{item.job.number:>4}  {item.job.name:{width}}  {plan.parameters:>13,} parameters  {memory}{time}{note}")
    device = plans[planned[0].job.number].device
    print(
        f"{len(planned)} jobs, {at_once} at once{about}; memory and time are estimates for {device}; nothing was"
        " started"
    )
