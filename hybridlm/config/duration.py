"""Durations, as a user writes them (1:30:00, 90m, 2h) and reads them."""

from __future__ import annotations

import re

_FORMS = "hours:minutes:seconds in quotes ('1:30:00'), or a number with s, m or h (90m)"
_UNITS = {"s": 1, "m": 60, "h": 3600}


def seconds_of(text: str) -> int:
    """The seconds that ``text`` means. ValueError: it is not a duration, or zero."""
    if clock := re.fullmatch(r"(\d+):([0-5]\d):([0-5]\d)", text):
        hours, minutes, seconds = map(int, clock.groups())
        total = (hours * 60 + minutes) * 60 + seconds
    elif number := re.fullmatch(r"(\d+)([smh])", text):
        total = int(number[1]) * _UNITS[number[2]]
    else:
        raise ValueError(f"expected {_FORMS}")
    if total == 0:
        raise ValueError(f"expected more than zero: {_FORMS}")
    return total


def duration_problems(field: str, value: str | float | None) -> list[str]:
    """The line about a ``field`` that is not a duration. A bare number is not one either: YAML reads 1:30:00 without
    quotes as a number of seconds, and a person would mean minutes."""
    if value is None:
        return []
    try:
        if not isinstance(value, str):
            raise ValueError(f"expected {_FORMS}")
        seconds_of(value)
    except ValueError as error:
        return [f"{field} = {value!r}: {error}"]
    return []


def clock(seconds: float) -> str:
    """A measured duration, to the second: 2:05, 1:30:00, 3d 04:00:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02d}:{minutes:02d}:{rest:02d}"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def roughly(seconds: float) -> str:
    """An estimated duration: 40 seconds, 12 minutes, 3.5 hours, 2.0 days."""
    for unit, size, least in (("days", 86400, 36 * 3600), ("hours", 3600, 5400), ("minutes", 60, 100)):
        if seconds >= least:
            return f"{seconds / size:.{0 if unit == 'minutes' else 1}f} {unit}"
    return "a second" if seconds < 1.5 else f"{seconds:.0f} seconds"
