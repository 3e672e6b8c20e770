"""From a command line to jobs: every point of the grid composed and validated, seeds, names, order."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hybridlm.config.overrides import key_of, quoted, value_of
from hybridlm.config.run import RunConfig
from hybridlm.errors import ConfigError, UserError
from hybridlm.machine.description import planned_steps, refuse_missing_gpu
from hybridlm.machine.profiles import planned_device
from hybridlm.sweep.grid import Axis
from hybridlm.sweep.job import Job, foreign

Compose = Callable[[Sequence[str]], RunConfig]
_SEED = "seed"
_LONGEST_NAME, _LONGEST_VALUE = 48, 20
_SHOWN = 3  # points at which a problem lies
_NOT_HERE = re.compile(r"ckpt|hydra(?!\.sweep\.dir$)\b.*")


@dataclass(frozen=True)
class Planned:
    """A job that is still to be written, with its configuration."""

    job: Job
    config: RunConfig


def plan(axes: Sequence[Axis], seeds: int, compose: Compose, *, gpu: bool, group: str) -> list[Planned]:
    """The jobs of a grid, ordered such that every point has its first seed before any has its second.

    seeds: per point, counted from the configuration's own; gpu: whether this machine has one; group: W&B's, unless
    there is another. ConfigError, all problems together: one line for each, with the points that it is of.
    """
    _refuse(axes, seeds)
    grid = [axis for axis in axes if axis.key not in (_SEED, "hydra.sweep.dir")]
    seed_axis = next((axis for axis in axes if axis.key == _SEED and axis.varied), None)
    fixed_seed = [line for axis in axes if axis.key == _SEED and not axis.varied for line in axis.values]
    points = list(itertools.product(*(axis.values for axis in grid)))
    varied = [i for i, axis in enumerate(grid) if axis.varied]
    first_seed = [seed_axis.values[0]] if seed_axis else fixed_seed
    configs = _composed(points, varied, first_seed, compose, gpu=gpu)
    planned: list[Planned] = []
    listed = [(line, compose([line]).seed) for line in seed_axis.values] if seed_axis else []
    compose([f"++{_SEED}={max(config.seed for config in configs) + seeds - 1}"])  # whether there is such a seed
    for turn in range(len(listed) or seeds):
        for point, config in zip(points, configs, strict=True):
            line, seed = listed[turn] if listed else (f"++{_SEED}={config.seed + turn}", config.seed + turn)
            several = bool(listed) or seeds > 1
            given = [*point, *([line] if several else fixed_seed), *_wandb(config, group)]
            values = {grid[i].key: _value(point[i]) for i in varied}
            name = _name(values, f"s{seed}" if several else "") or config.model.name
            job = Job(len(planned) + 1, name, tuple(given), values, seed)
            planned.append(Planned(job, config.model_copy(update={"seed": seed})))
    return planned


def _wandb(config: RunConfig, group: str) -> list[str]:
    """Puts the jobs of a sweep into one group of W&B, as Hydra's sweeps are."""
    logger = config.logger
    if logger.name != "wandb":
        return []
    named = {"logger.group": (logger.group, group), "logger.job_type": (logger.job_type, "sweep")}
    return [f"++{field}={quoted(value)}" for field, (given, value) in named.items() if given is None]


def depth_warning(planned: Sequence[Planned]) -> str | None:
    """Patterns of different depths, each brought to the cost of its own reference, are not comparable."""
    depths: dict[tuple[tuple[str, str], ...], set[int]] = {}
    for item in planned:
        if item.config.sweep.match is not None and item.config.sweep.target is None:
            others = tuple(
                (key, value) for key, value in item.job.point.items() if key not in ("model", "model.pattern")
            )
            depths.setdefault(others, set()).add(len(item.config.model.layers))
    uneven = next((sorted(found) for found in depths.values() if len(found) > 1), None)
    if uneven is None:
        return None
    reference = planned[0].config.sweep.reference
    return (
        f"sweep.match: the patterns are {', '.join(map(str, uneven))} layers deep, and each is brought to {reference}"
        " of its own depth; give all the same with model.n_layers, or name a cost with sweep.target"
    )


def _refuse(axes: Sequence[Axis], seeds: int) -> None:
    problems = []
    for axis in axes:
        if _NOT_HERE.fullmatch(axis.key):
            remedy = (
                "--resume FOLDER goes on with a sweep"
                if axis.key == "ckpt"
                else "hydra.sweep.dir=... names the folder of the sweep"
            )
            problems.append(f"{axis.key}: not here; {remedy} (Hydra's launchers and sweepers: python train.py -m)")
        elif axis.varied and axis.key == "hydra.sweep.dir":
            problems.append("hydra.sweep.dir: one folder for the whole sweep")
        elif axis.key != "hydra.sweep.dir" and (
            strange := next((problem for line in axis.values if (problem := _strange(line))), None)
        ):
            problems.append(strange)
        elif not axis.values:
            problems.append(
                f"{axis.key}: a range to draw from, or nothing; list the values (Hydra's optuna sweeper draws:"
                " docs/sweeps.md)"
            )
        elif again := [value for value, count in Counter(map(_value, axis.values)).items() if count > 1]:
            problems.append(f"{axis.key}: {again[0]} stands there twice")
    if seeds > 1 and any(axis.key == _SEED and axis.varied for axis in axes):
        problems.append(f"--seeds {seeds}: the seeds are listed already (seed=...)")
    if problems:
        raise ConfigError(problems)


def _strange(line: str) -> str | None:
    """What keeps a job that was written down from being started again. (Options and fields that are not there,
    composing tells better.)"""
    return foreign(line) if "$" in line else None


def _composed(
    points: Sequence[tuple[str, ...]], varied: Sequence[int], seed: Sequence[str], compose: Compose, *, gpu: bool
) -> list[RunConfig]:
    """The configuration of each point. ConfigError as of ``plan``."""
    configs, wrong = [], dict[str, list[str]]()
    for point in points:
        try:
            config = compose([*point, *seed])
            refuse_missing_gpu(config, gpu)
            planned_steps(config, planned_device(config.hardware))
            configs.append(config)
        except UserError as error:
            for problem in error.problems:
                wrong.setdefault(problem, []).append(
                    " ".join(f"{key_of(point[i])}={_value(point[i])[:_LONGEST_NAME]}" for i in varied)
                )
    if wrong:
        raise ConfigError([f"{problem}{_places(at, len(points))}" for problem, at in wrong.items()])
    return configs


def _places(at: Sequence[str], points: int) -> str:
    if len(at) == points:
        return "" if points == 1 else f" (at all {points} points)"
    more = f" and {len(at) - _SHOWN} more" if len(at) > _SHOWN else ""
    return f" (at {'; '.join(at[:_SHOWN])}{more})"


def _value(override: str) -> str:
    """What stands behind the ``=``, without the quotes and backslashes of Hydra's grammar."""
    value = value_of([override], key_of(override)) or ""
    return re.sub(r"\\(.)", r"\1", value)


def _name(values: dict[str, str], seed: str) -> str:
    """A short name for a folder: the values, behind the field's own name where they are numbers."""
    parts = []
    for key, value in values.items():
        text = re.sub(r"[^A-Za-z0-9.+-]+", "", re.sub(r"(?<=\d)\*", "x", value))[:_LONGEST_VALUE]  # M1*2 as M1x2
        plain = "." not in key or re.match(r"[A-Za-z]", text)
        parts.append(text if plain else f"{key.rpartition('.')[2]}{text}")
    name = "-".join(part for part in parts if part)[:_LONGEST_NAME].strip(".-")
    return "-".join(part for part in (name, seed) if part)
