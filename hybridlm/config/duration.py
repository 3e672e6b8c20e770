"""Durations, as a user writes them (1:30:00, 90m, 2h) and reads them."""

from __future__ import annotations

import re

FORMS = "hours:minutes:seconds in quotes ('1:30:00'), or a number with s, m or h (90m)"


def seconds_of(text: object) -> int:
    """The seconds that ``text`` means; 0: it is not a duration. A bare number is not one either: YAML reads 1:30:00
    without quotes as a number of seconds, and a person would mean minutes."""
    found = re.fullmatch(r"(\d+):([0-5]\d):([0-5]\d)|(\d+)h|(\d+)m|(\d+)s", text) if isinstance(text, str) else None
    seconds = (3600, 60, 1, 3600, 60, 1)
    return sum(int(number or 0) * each for number, each in zip(found.groups(), seconds, strict=True)) if found else 0


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
