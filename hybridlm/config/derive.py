"""Checks that several kinds of layers share when they derive their numbers."""

from __future__ import annotations

import math

from hybridlm.config.problems import show
from hybridlm.config.section import Section


def divisors(number: int, near: int) -> str:
    """The divisors of ``number`` next to ``near``, as text."""
    found = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    found = sorted({*found, *(number // d for d in found)})
    below, above = [d for d in found if d < near], [d for d in found if d > near]
    return " and ".join(str(d) for d in [*below[-1:], *above[:1]])


def inner_channels(expand: float, d_model: int, where: str) -> tuple[int, list[str]]:
    """expand x d_model, a whole number, and what is wrong with it."""
    product = expand * d_model
    if (channels := round(product)) < 1 or not math.isclose(channels, product, rel_tol=1e-9):
        shown = f"expand x d_model = {expand:g} x {d_model} = {product:g}"
        return 1, [f"{where}.expand = {expand:g}: {shown} is not a whole number of channels"]
    return channels, []


def range_problems(section: Section, where: str, *names: str) -> list[str]:
    """What is wrong with fields that hold [low, high] of a distribution of positive numbers."""
    return [
        f"{where}.{name} = {show(pair)}: expected [low, high] with 0 < low <= high"
        for name in names
        if not 0 < (pair := getattr(section, name))[0] <= pair[1]
    ]
