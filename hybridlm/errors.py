"""The exceptions that end a command with a line per problem instead of a traceback."""

from __future__ import annotations

from collections.abc import Sequence

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
