"""``hybridlm sweep``."""

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
from hybridlm.memory.plan import Plan, plan_run
from hybridlm.memory.report import refusal
from hybridlm.sweep.expand import Compose, PlannedJob, depth_warning, expand
from hybridlm.sweep.grid import Axis
from hybridlm.sweep.job import create, find, refuse_taken
from hybridlm.sweep.runner import Environment, Runner

Axes = Callable[[Sequence[str]], list[Axis]]


def new_sweep(
    overrides: Sequence[str], *, seeds: int, jobs: int | None, dry_run: bool, axes: Axes, compose: Compose
) -> int:
    """Plans a sweep and runs it unless ``dry_run``. Returns the exit code.

    seeds: per point; jobs: in parallel, None: one per GPU, or one; axes: parses overrides into a grid; compose:
    overrides to a configuration.

    Raises:
        ConfigError: everything that is wrong with any point, before the first job starts.
    """
    if launch() is not None:
        raise UserError("sweep: do not use a launcher, under which each process would run the whole sweep")
    grid, gpus = axes(overrides), visible_gpus()
    folder = _folder([line for axis in grid for line in axis.values])
    refuse_taken(folder)
    planned = expand(grid, seeds, compose, gpu=bool(gpus) or dry_run, group=folder.name)
    if (warning := depth_warning(planned)) is not None:
        print(warning, file=sys.stderr)
    slots, plans = slots_of(planned, gpus, jobs), plans_of(planned)
    total = planned_seconds(plans, len({slot.get("CUDA_VISIBLE_DEVICES") for slot in slots}))
    size = f"{len(planned)} jobs, {len(slots)} in parallel{f', about {roughly(total)} (estimate)' if total else ''}"
    if dry_run:
        _list(planned, plans)
        print(f"{size}; memory and time are estimates for {plans[1].device}; nothing was started")
        return 0
    if too_large := [job for job, _ in planned if not plans[job.number].fits]:
        raise ConfigError([f"{job.name}: {refusal(plans[job.number], [])[0]}" for job in too_large])
    varied = [axis.key for axis in grid if axis.varied and axis.key != "seed"]
    options = (["--seeds", str(seeds)] if seeds > 1 else []) + (["--jobs", str(jobs)] if jobs else [])
    command = shlex.join(["hybridlm", "sweep", *overrides, *options])
    sweep = create(folder, [item.job for item in planned], overrides, varied, command)
    print(f"sweep     {size}, in {folder}", flush=True)
    return Runner(sweep, slots).run()


def resume_sweep(name: str, *, jobs: int | None, compose: Compose) -> int:
    """Runs what is not finished of the sweep in a folder, or of the ``last`` one. Returns the exit code. UserError: it
    cannot be resumed."""
    sweep = find(name)
    left = [job for job in sweep.read() if job.status != "finished"]
    with chdir(sweep.cwd):  # the jobs' relative paths start from there
        planned = [PlannedJob(job, compose(job.overrides)) for job in left]
    print(f"sweep     {len(left)} of {len(sweep.jobs)} jobs are not finished, in {sweep.folder}", flush=True)
    return Runner(sweep, slots_of(planned, visible_gpus(), jobs)).run()


def _folder(overrides: Sequence[str]) -> Path:
    named = value_of(overrides, "hydra.sweep.dir")
    if named is not None and "${" in named:
        raise ConfigError(f"hydra.sweep.dir = {named!r}: hybridlm sweep takes a plain path, without ${{...}}")
    return Path(named or datetime.now().strftime("multirun/%Y-%m-%d/%H-%M-%S-%f"))


def slots_of(planned: Sequence[PlannedJob], gpus: Sequence[str], jobs: int | None) -> list[Environment]:
    """The environment of each parallel job: a share of the GPUs (as many as the job with most devices needs), or of the
    cores. ConfigError: a job needs more GPUs than there are."""
    on_gpu = bool(gpus) and any(item.config.hardware.accelerator != CPU for item in planned)
    devices = [item.config.trainer.devices for item in planned]
    most = max((number for number in devices if isinstance(number, int)), default=1)
    if on_gpu and most > len(gpus):
        raise ConfigError(f"trainer.devices = {most}: this machine has {len(gpus)}")
    shares = [",".join(gpus[i : i + most]) for i in range(0, len(gpus) - most + 1, most)] if on_gpu else []
    count = max(1, min(jobs or len(shares) or 1, len(planned)))  # a slot without a job would waste cores
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = os.environ.get("OMP_NUM_THREADS", "")
    threads = max(1, min(cores // count, int(limit) if limit.isdecimal() and int(limit) else cores))
    return [
        {"OMP_NUM_THREADS": str(threads)} | ({"CUDA_VISIBLE_DEVICES": shares[i % len(shares)]} if shares else {})
        for i in range(count)
    ]


def plans_of(planned: Sequence[PlannedJob]) -> dict[int, Plan]:
    """The plan of each job by its number; jobs that differ only in seed, learning rate and weight decay share one.
    ConfigError: the settings of a job conflict."""
    known: dict[str, Plan] = {}
    plans = {}
    for job, config in planned:
        optim = config.optim.model_copy(update={"lr": 1.0, "weight_decay": 0.0})
        shape = repr(config.model_copy(update={"seed": 0, "optim": optim}))
        known[shape] = plans[job.number] = known.get(shape) or plan_run(config)
    return plans


def planned_seconds(plans: Mapping[int, Plan], devices: int) -> float | None:
    """All jobs on ``devices`` that work in parallel; a machine's CPU is one, however many jobs share it. None:
    unknown."""
    known = [plan.seconds for plan in plans.values() if plan.seconds is not None]
    return max(sum(known) / devices, *known) if known and len(known) == len(plans) else None


def _list(planned: Sequence[PlannedJob], plans: Mapping[int, Plan]) -> None:
    """A line per job: parameters, planned memory, estimated time, and how it was matched."""
    width = max(len(item.job.name) for item in planned)
    for job, config in planned:
        plan = plans[job.number]
        memory = f"{plan.reserved_bytes / 2**30:.2f} GiB{'' if plan.fits else ', DOES NOT FIT'}"
        notes = [memory, *([] if plan.seconds is None else [roughly(plan.seconds)]), config.sweep.matched or ""]
        print(f"{job.number:>4}  {job.name:{width}}  {plan.parameters:>13,} parameters  {'  '.join(notes).rstrip()}")
