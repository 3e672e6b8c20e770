"""The base of every config section, and the two exceptions that end a command with a line instead of a traceback."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AllowInfNan, BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """A frozen, strict section: unknown keys are refused and nothing is converted but int to float and list to tuple."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ConfigError(Exception):
    """What the user typed cannot be used. ``problems`` holds one line each: what, where, what is legal."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class RunFailed(Exception):
    """A run that cannot go on, for a reason that needs no traceback: one line, exit code 1."""


def to_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _to_limits(value: object) -> object:
    """Hydra's grammar writes infinity as inf, YAML as .inf, which reaches us from a command line as text."""
    return tuple(float("inf") if item == ".inf" else item for item in value) if isinstance(value, (list, tuple)) else value


# YAML has lists only; a frozen section holds tuples.
Pair = Annotated[tuple[float, float], BeforeValidator(to_tuple)]
Limits = Annotated[tuple[Annotated[float, AllowInfNan(True)], Annotated[float, AllowInfNan(True)]], BeforeValidator(_to_limits)]
Auto = Annotated[int, Field(ge=1)] | Literal["auto"]
Strings = Annotated[tuple[str, ...], BeforeValidator(to_tuple)]
