"""How torch's compiler sees the calls of other packages: not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def outside_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, which a compiled block calls as it is, between two graphs: the packages' autograd functions,
    autotuners and device contexts are not made to be traced. (The import of torch's compiler takes seconds: only
    modules of kernels in use pay it.)"""
    return torch.compiler.disable(function)  # type: ignore[no-any-return]
