"""The base of every config section, and the types that several of them use."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AllowInfNan, BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """A frozen, strict section: unknown keys are refused and nothing is converted but int to float and list to
    tuple."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def to_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _to_limits(value: object) -> object:
    """Hydra's grammar writes infinity as inf, YAML as .inf, which reaches us from a command line as text."""
    return (
        tuple(float("inf") if item == ".inf" else item for item in value) if isinstance(value, (list, tuple)) else value
    )


# YAML has lists only; a frozen section holds tuples.
Pair = Annotated[tuple[float, float], BeforeValidator(to_tuple)]
Limits = Annotated[
    tuple[Annotated[float, AllowInfNan(True)], Annotated[float, AllowInfNan(True)]], BeforeValidator(_to_limits)
]
Auto = Annotated[int, Field(ge=1)] | Literal["auto"]
Strings = Annotated[tuple[str, ...], BeforeValidator(to_tuple)]
Paths = str | Strings  # one or several
