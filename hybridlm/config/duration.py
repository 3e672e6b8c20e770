"""A length of time as a user writes it: 1:30:00, 90m, 2h."""

from __future__ import annotations

import re

_FORMS = "hours:minutes:seconds in quotes ('1:30:00'), or a number with s, m or h (90m)"
_UNITS = {"s": 1, "m": 60, "h": 3600}


def seconds_of(text: str) -> int:
    """The seconds that ``text`` stands for. ValueError: it is no length of time, or none at all."""
    if clock := re.fullmatch(r"(\d+):([0-5]\d):([0-5]\d)", text):
        hours, minutes, seconds = map(int, clock.groups())
        total = (hours * 60 + minutes) * 60 + seconds
    elif number := re.fullmatch(r"(\d+)([smh])", text):
        total = int(number[1]) * _UNITS[number[2]]
    else:
        raise ValueError(f"expected {_FORMS}")
    if total == 0:
        raise ValueError(f"expected more than nothing: {_FORMS}")
    return total


def duration_problems(field: str, value: str | float | None) -> list[str]:
    """The line about a ``field`` that is no length of time. A bare number is none either: YAML reads 1:30:00 without quotes as one, in
    seconds, and a person would mean minutes by it."""
    if value is None:
        return []
    try:
        if not isinstance(value, str):
            raise ValueError(f"expected {_FORMS}")
        seconds_of(value)
    except ValueError as error:
        return [f"{field} = {value!r}: {error}"]
    return []
