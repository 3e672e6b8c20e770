"""What a corpus consists of: documents, and what cannot be one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from hybridlm.errors import printable

LONGEST = (
    16_000_000  # bytes of a text or a record: memory holds one at a time, as text, as what JSON makes of it, and as ids
)
TOO_LONG = f"more than {LONGEST:,} bytes"
_SHOWN = 200  # characters of a detail


class Turn(NamedTuple):
    """One message of a conversation."""

    role: str  # system, user or assistant
    content: str


@dataclass(frozen=True)
class Document:
    """One text, or one conversation.

    name: its path below the corpus' root with ``/``, and its line or row where a file holds many.
    turns: the messages of a conversation, whose ``text`` is empty.
    key: what decides between training and validation, where that is not the content.
    """

    name: str
    text: str
    turns: tuple[Turn, ...] = ()
    key: str = ""

    @property
    def size(self) -> int:
        """Characters of text."""
        return sum(map(len, self.texts))

    @property
    def texts(self) -> tuple[str, ...]:
        """The text, or the contents of the messages."""
        return tuple(turn.content for turn in self.turns) or (self.text,)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the content."""
        content = json.dumps(self.turns) if self.turns else self.text
        return hashlib.sha256(content.encode()).digest()


@dataclass(frozen=True)
class Bad:
    """What cannot be a document. where: file and line or row; what: the kind of mistake; detail: more of it, may be
    empty.

    All three can be shown: names of files and fields may hold bytes that are not UTF-8, line ends and terminal codes,
    and are written out.
    """

    where: str
    what: str
    detail: str = ""

    def __post_init__(self) -> None:
        for name in ("where", "what", "detail"):
            object.__setattr__(self, name, printable(getattr(self, name)))
        if len(self.detail) > _SHOWN:
            object.__setattr__(self, "detail", f"{self.detail[:_SHOWN]}...")

    def __str__(self) -> str:
        return f"{self.where}: {self.what}{f' ({self.detail})' if self.detail else ''}"


class Records(Protocol):
    """What a record (a line of JSON, a row of a table) has to hold; can be pickled."""

    @property
    def columns(self) -> tuple[tuple[str, ...], ...]:
        """The sets of columns that will do, in order of preference: a table is read by the first of which it has
        all."""

    @property
    def optional(self) -> tuple[str, ...]:
        """Columns that are read too where they are there."""

    @property
    def texts(self) -> list[str]:
        """The columns that hold nothing but a text."""

    def document(self, where: str, record: Mapping[str, Any]) -> Document | Bad:
        """The document of a record that was found at ``where``."""


@dataclass(frozen=True)
class TextRecords:
    """Records that hold a text in one field."""

    field: str

    @property
    def columns(self) -> tuple[tuple[str, ...], ...]:
        return ((self.field,),)

    @property
    def optional(self) -> tuple[str, ...]:
        return ()

    @property
    def texts(self) -> list[str]:
        return [self.field]

    def document(self, where: str, record: Mapping[str, Any]) -> Document | Bad:
        if self.field not in record:
            return Bad(where, f"no field {self.field!r}", f"it has {', '.join(map(str, record)) or 'none'}")
        text = record[self.field]
        if not isinstance(text, str):
            return Bad(where, f"{self.field!r} is not text", "null" if text is None else type(text).__name__)
        if not text:
            return Bad(where, "empty")
        if len(text) > LONGEST:
            return Bad(where, TOO_LONG, f"{len(text):,} characters")
        if not encodable(text):
            return Bad(where, f"{self.field!r} is not text", "half a surrogate pair")
        return Document(where, text)


def encodable(text: str) -> bool:
    """Whether ``text`` has a form in UTF-8; JSON can write half of a surrogate pair, which has none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
