"""The base class of config sections, and types that several of them use."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AllowInfNan, BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """A frozen, strict section: unknown keys are refused, and nothing is converted except int to float and list to
    tuple."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def to_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _to_limits(value: object) -> object:
    """Infinity is inf in Hydra's grammar and .inf in YAML, which is text when it comes from a command line."""
    return (
        tuple(float("inf") if item == ".inf" else item for item in value) if isinstance(value, (list, tuple)) else value
    )


# YAML has lists; a frozen section holds tuples.
Pair = Annotated[tuple[float, float], BeforeValidator(to_tuple)]
Limits = Annotated[
    tuple[Annotated[float, AllowInfNan(True)], Annotated[float, AllowInfNan(True)]], BeforeValidator(_to_limits)
]
Auto = Annotated[int, Field(ge=1)] | Literal["auto"]
Strings = Annotated[tuple[str, ...], BeforeValidator(to_tuple)]
_Path = Annotated[str, Field(min_length=1)]
Paths = _Path | Annotated[tuple[_Path, ...], BeforeValidator(to_tuple), Field(min_length=1)]  # one or several
