"""The exceptions that end a command with a line per problem instead of a traceback."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TextIO

# Of Unicode's category Cc all but the tab and the line end, and the marks that turn the direction of writing.
_ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")

_LONGEST = 2_000  # characters of a problem; a line with everything that a user wrote would hide what is wrong with it


class UserError(Exception):
    """What the user asked for cannot be done: a file, an argument, a folder. Exit code 2.

    ``problems`` holds one line each: what, where, what is legal.
    """

    label = "error"

    def __init__(self, problems: str | Sequence[str]) -> None:
        said = [problems] if isinstance(problems, str) else problems
        self.problems: list[str] = [line if len(line) <= _LONGEST else line[:_LONGEST] + "..." for line in said]
        super().__init__("\n".join(self.problems))


class ConfigError(UserError):
    """A field or a group of the configuration is wrong."""

    label = "config error"


class RunFailed(Exception):
    """A run that cannot go on, for a reason that needs no traceback: one line, exit code 1."""

    label = "error"


def printable(text: str) -> str:
    """``text`` in one line that every terminal and file takes: what cannot be printed as its escape in Python."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def harmless(text: str) -> str:
    """``text`` of any length as a terminal may take it: line ends and tabs stay, all that would move a cursor, set a
    title or turn the writing is shown as its escape in Python."""
    return _ACTING.sub(lambda found: printable(found[0]), text)


def for_stream(text: str, stream: TextIO) -> str:
    """What to write of a model's or a corpus' own text: into a file or a pipe as it is, on a terminal ``harmless``."""
    return harmless(text) if stream.isatty() else text
