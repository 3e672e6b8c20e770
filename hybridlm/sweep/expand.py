"""Expands a grid into jobs: every point composed and validated, with seeds, names and order."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from hybridlm.config.overrides import key_of, quoted, value_of
from hybridlm.config.run import RunConfig
from hybridlm.errors import ConfigError, UserError
from hybridlm.machine.description import planned_steps, refuse_missing_gpu
from hybridlm.machine.profiles import planned_device
from hybridlm.runs.initial import NOT_IN_A_SWEEP
from hybridlm.runs.run_folder import NEWEST
from hybridlm.sweep.grid import Axis
from hybridlm.sweep.job import Job, foreign

Compose = Callable[[Sequence[str]], RunConfig]
_SEED, _FOLDER = "seed", "hydra.sweep.dir"
_NAME_LENGTH, _VALUE_LENGTH = 48, 20
_MAX_POINTS_SHOWN = 3
_NOT_IN_A_SWEEP = re.compile(r"ckpt|hydra(?!\.sweep\.dir$)\b.*")


class PlannedJob(NamedTuple):
    """A job with its configuration."""

    job: Job
    config: RunConfig


def expand(axes: Sequence[Axis], seeds: int, compose: Compose, *, gpu: bool, group: str) -> list[PlannedJob]:
    """The jobs of a grid, ordered so that every point has its first seed before any has its second.

    seeds: per point, counted from the configuration's own; gpu: whether this machine has one; group: W&B's, unless the
    configuration names one.

    Raises:
        ConfigError: all problems together, a line for each, with the points where it occurs.
    """
    _refuse(axes, seeds)
    grid = [axis for axis in axes if axis.key not in (_SEED, _FOLDER)]
    varied = [i for i, axis in enumerate(grid) if axis.varied]
    points = list(itertools.product(*(axis.values for axis in grid)))
    seed_axis = next((axis for axis in axes if axis.key == _SEED), Axis(_SEED, (), varied=False))
    configs = _composed(points, varied, seed_axis.values[:1], compose, gpu=gpu)
    listed = [(line, compose([line]).seed) for line in seed_axis.values] if seed_axis.varied else []
    compose([f"++{_SEED}={max(config.seed for config in configs) + seeds - 1}"])  # raises if the last seed is too large
    several = len(listed) > 0 or seeds > 1
    planned: list[PlannedJob] = []
    for turn in range(len(listed) or seeds):
        for point, config in zip(points, configs, strict=True):
            line, seed = listed[turn] if listed else (f"++{_SEED}={config.seed + turn}", config.seed + turn)
            overrides = (*point, *([line] if several else seed_axis.values), *_wandb_group(config, group))
            values = {grid[i].key: _value(point[i]) for i in varied}
            name = _name(values, f"s{seed}" if several else "") or config.model.name
            job = Job(number=len(planned) + 1, name=name, overrides=overrides, point=values, seed=seed)
            planned.append(PlannedJob(job, config.model_copy(update={"seed": seed})))
    return planned


def _wandb_group(config: RunConfig, group: str) -> list[str]:
    """Overrides that put the jobs of a sweep into one W&B group, as Hydra's sweeps are."""
    logger = config.logger
    if logger.name != "wandb":
        return []
    named = {"logger.group": (logger.group, group), "logger.job_type": (logger.job_type, "sweep")}
    return [f"++{field}={quoted(value)}" for field, (given, value) in named.items() if given is None]


def depth_warning(planned: Sequence[PlannedJob]) -> str | None:
    """Patterns of different depths, each matched to its own reference, are not comparable."""
    depths: dict[object, set[int]] = defaultdict(set)
    for job, config in planned:
        if config.sweep.match is not None and config.sweep.target is None:
            others = [item for item in job.point.items() if item[0] not in ("model", "model.pattern")]
            depths[tuple(others)].add(len(config.model.layers))
    uneven = next((sorted(found) for found in depths.values() if len(found) > 1), None)
    if uneven is None:
        return None
    return (
        f"sweep.match: the patterns have {', '.join(map(str, uneven))} layers, and each is matched to"
        f" {planned[0].config.sweep.reference} of its own depth; set model.n_layers to give all the same depth, or"
        " sweep.target to match all to one cost"
    )


def _refuse(axes: Sequence[Axis], seeds: int) -> None:
    """ConfigError: what is wrong with the command line itself, the first problem of each axis."""
    problems = []
    for axis in axes:
        key, values, its_folder = axis.key, list(map(_value, axis.values)), axis.key == _FOLDER
        repeated = [value for i, value in enumerate(values) if value in values[:i]]
        strange = [problem for line in axis.values if "$" in line and (problem := foreign(line)) is not None]
        instead = "--resume FOLDER resumes a sweep" if key == "ckpt" else f"{_FOLDER}=... names its folder"
        launchers = "Hydra's launchers and sweepers: python train.py -m"
        rules: tuple[tuple[object, str], ...] = (
            (_NOT_IN_A_SWEEP.fullmatch(key), f"{key}: not allowed in hybridlm sweep; {instead} ({launchers})"),
            (
                key == "init_from" and set(NEWEST).intersection(values),
                NOT_IN_A_SWEEP,
            ),
            (axis.varied and its_folder, f"{_FOLDER}: a sweep has one folder"),
            (strange and not its_folder, "".join(strange[:1])),
            (not values, f"{key}: needs a list of values (Hydra's optuna sweeper samples ranges: docs/sweeps.md)"),
            (repeated, f"{key}: {''.join(repeated[:1])} is listed twice"),
            (key == _SEED and axis.varied and seeds > 1, f"--seeds {seeds}: conflicts with the list seed=..."),
        )
        problems += [problem for wrong, problem in rules if wrong][:1]
    if problems:
        raise ConfigError(problems)


def _composed(
    points: Sequence[tuple[str, ...]], varied: Sequence[int], seed: Sequence[str], compose: Compose, *, gpu: bool
) -> list[RunConfig]:
    """The configuration of each point. ConfigError as in ``expand``."""
    configs: list[RunConfig] = []
    wrong: dict[str, list[str]] = defaultdict(list)
    for point in points:
        try:
            config = compose([*point, *seed])
            refuse_missing_gpu(config, gpu)
            planned_steps(config, planned_device(config.hardware))
            configs.append(config)
        except UserError as error:
            place = " ".join(f"{key_of(point[i])}={_value(point[i])[:_NAME_LENGTH]}" for i in varied)
            for problem in error.problems:
                wrong[problem].append(place)
    if wrong:
        raise ConfigError([f"{problem}{_where(places, len(points))}" for problem, places in wrong.items()])
    return configs


def _where(places: Sequence[str], points: int) -> str:
    if len(places) == points:
        return "" if points == 1 else f" (at all {points} points)"
    more = f" and {len(places) - _MAX_POINTS_SHOWN} more" if len(places) > _MAX_POINTS_SHOWN else ""
    return f" (at {'; '.join(places[:_MAX_POINTS_SHOWN])}{more})"


def _value(override: str) -> str:
    """The text after the ``=``, without the quotes and backslashes of Hydra's grammar."""
    return re.sub(r"\\(.)", r"\1", value_of([override], key_of(override)) or "")


def _name(values: Mapping[str, str], seed: str) -> str:
    """A short name for a folder: the values, after the field's own name if they are numbers."""
    parts = []
    for key, value in values.items():
        text = re.sub(r"[^A-Za-z0-9.+-]+", "", re.sub(r"(?<=\d)\*", "x", value))[:_VALUE_LENGTH]  # M1*2 as M1x2
        plain = "." not in key or re.match(r"[A-Za-z]", text)
        parts.append(text if plain else f"{key.rpartition('.')[2]}{text}")
    name = "-".join(filter(None, parts))[:_NAME_LENGTH].strip(".-")
    return "-".join(filter(None, (name, seed)))
