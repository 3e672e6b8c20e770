"""A part of gpu_check.py: its cases, how one is measured, how long it may take, and the bars it has to reach."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from gpu.setting import Setting

Row = dict[str, object]  # one line of a result table; "case" names it, "error" or "left_out" say why there is no number


@dataclass(frozen=True)
class Bar:
    """A bound: ``value(rows)`` is the number that counts, None where it was not measured."""

    what: str
    bound: str  # as it is printed
    met: Callable[[float], bool] | None  # None: the number is reported, whatever it is
    value: Callable[[Sequence[Row]], float | None]
    unit: str = "x"

    def row(self, rows: Sequence[Row]) -> list[str]:
        """What, bound, value, verdict."""
        value = self.value(rows)
        if value is None:
            return [self.what, self.bound, "not measured", "-"]
        shown = f"{value:.1%}" if self.unit == "%" else f"{value:.2f}{self.unit}"
        return [
            self.what,
            self.bound,
            shown,
            "reported" if self.met is None else "met" if self.met(value) else "**missed**",
        ]


@dataclass(frozen=True)
class Part:
    """cases: names, which ``measure`` understands. fresh: a process for each case, else one for all. seconds: of the
    whole part."""

    name: str
    what: str
    seconds: int
    cases: Callable[[Setting], Sequence[str]]
    measure: Callable[[Setting, str], Iterable[Row]]
    bars: Sequence[Bar] = ()
    fresh: bool = False


def at_least(bound: float) -> Callable[[float], bool]:
    return lambda value: value >= bound


def at_most(bound: float) -> Callable[[float], bool]:
    return lambda value: value <= bound


def pick(rows: Sequence[Row], key: str, where: Mapping[str, object]) -> float | None:
    """``key`` of the first row that has the values of ``where`` and a number there; None: there is none."""
    for row in rows:
        value = row.get(key)
        if isinstance(value, (int, float)) and all(row.get(name) == wanted for name, wanted in where.items()):
            return float(value)
    return None


def quotient(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below
