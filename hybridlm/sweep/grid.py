"""A grid of overrides: the axes that a command line spans, its points, and the overrides that no point uses."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hybridlm.config.constraints import unused_section_warnings
from hybridlm.config.run import RunConfig
from hybridlm.errors import UserError

_SHAPES_MODEL = ("model", "size", "experiments")  # groups that may change which layers there are
_POINTS_LOOKED_AT = 64  # more are not composed ahead only to warn


@dataclass(frozen=True)
class Axis:
    """One override of a command line, with the single values that it stands for.

    values: overrides, ``key=value``; one where nothing is varied, and none where the values are drawn
    (``interval(0,1)``).
    """

    key: str
    values: tuple[str, ...]
    varied: bool


def effectless(axes: Sequence[Axis], compose: Callable[[Sequence[str]], RunConfig]) -> list[str]:
    """The warnings about overridden sections that hold at every point. compose: the configuration of some overrides."""
    if not all(axis.values for axis in axes):
        return []
    choices = [axis.values if axis.key.split(".")[0] in _SHAPES_MODEL else axis.values[:1] for axis in axes]
    points = list(itertools.islice(itertools.product(*choices), _POINTS_LOOKED_AT + 1))
    if len(points) > _POINTS_LOOKED_AT:
        return []
    try:
        warnings = [unused_section_warnings(compose(point), point) for point in points]
    except UserError:
        return []  # the job of that point reports it
    return [line for line in dict.fromkeys(warnings[0]) if all(line in others for others in warnings)]
