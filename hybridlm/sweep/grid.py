"""The axes of a sweep, and overrides that no point of its grid uses."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hybridlm.config.constraints import unused_section_warnings
from hybridlm.config.run import RunConfig
from hybridlm.errors import UserError

_SHAPES_MODEL = ("model", "model/style", "size", "experiments")  # groups that may change which layers there are
_MAX_POINTS = 64  # larger grids are not composed ahead just for a warning


@dataclass(frozen=True)
class Axis:
    """One override of a command line with the single values it stands for.

    values: overrides, ``key=value``; one if nothing is varied, and none if the values are sampled (``interval(0,1)``).
    """

    key: str
    values: tuple[str, ...]
    varied: bool


def effectless(axes: Sequence[Axis], compose: Callable[[Sequence[str]], RunConfig]) -> list[str]:
    """The warnings about unused sections that hold at every point. compose: overrides to a configuration."""
    choices = [axis.values if axis.key.split(".")[0] in _SHAPES_MODEL else axis.values[:1] for axis in axes]
    points = list(itertools.islice(itertools.product(*choices), _MAX_POINTS + 1))
    if not 1 <= len(points) <= _MAX_POINTS:
        return []
    try:
        warnings = [unused_section_warnings(compose(point), point) for point in points]
    except UserError:
        return []  # the job at that point reports it
    return [line for line in dict.fromkeys(warnings[0]) if all(line in others for others in warnings)]
