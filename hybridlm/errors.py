"""The exceptions that end a command with one line per problem instead of a traceback."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TextIO

# Of Unicode's category Cc all but the tab and the line end, and the marks that turn the direction of writing.
_ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")

_LONGEST = 2_000  # characters of a problem; a longer line would hide what is wrong


class UserError(Exception):
    """The user's input cannot be used: a file, an argument, a folder. Exit code 2.

    ``problems`` has one line for each: where, what is wrong, what is expected.
    """

    label = "error"

    def __init__(self, problems: str | Sequence[str]) -> None:
        lines = [problems] if isinstance(problems, str) else problems
        self.problems: list[str] = [line if len(line) <= _LONGEST else line[:_LONGEST] + "..." for line in lines]
        super().__init__("\n".join(self.problems))


class ConfigError(UserError):
    """A field or a group of the configuration is wrong."""

    label = "config error"


class RunFailed(Exception):
    """A run failed for a reason that needs no traceback: one line, exit code 1."""

    label = "error"


def printable(text: str) -> str:
    """``text`` in one line, with Python's escapes for characters that cannot be printed."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def harmless(text: str) -> str:
    """``text`` made safe for a terminal: line ends and tabs are kept, other control characters and marks of the writing
    direction are shown as Python's escapes."""
    return _ACTING.sub(lambda found: printable(found[0]), text)


def for_stream(text: str, stream: TextIO) -> str:
    """Text of a model or a corpus for ``stream``: unchanged for a file or a pipe, ``harmless`` for a terminal."""
    return harmless(text) if stream.isatty() else text
