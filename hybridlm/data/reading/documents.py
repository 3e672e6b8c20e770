"""A corpus: documents in units, and what cannot be a document."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from hybridlm.errors import printable

# Bytes of a text or a record: one at a time is held in memory, as text, as parsed JSON and as ids.
LONGEST = 16_000_000
TOO_LONG = f"more than {LONGEST:,} bytes"
_SHOWN = 200  # characters of a detail


class Turn(NamedTuple):
    """One message of a conversation."""

    role: str  # system, user or assistant
    content: str


@dataclass(frozen=True)
class Document:
    """One text, or one conversation.

    name: path below the root of the corpus with ``/``, plus line or row where a file holds many.
    turns: the messages of a conversation, whose ``text`` is empty; of them the first ``context`` are not learned.
    rejected: of a pair of preferences, the messages of the worse conversation, of which the same is true.
    key: decides between training and validation where the content does not.
    forms: what a conversation's record was recognised as, and what in it was rewritten, for the report.
    """

    name: str
    text: str
    turns: tuple[Turn, ...] = ()
    context: int = 0
    rejected: tuple[Turn, ...] = ()
    key: str = ""
    forms: tuple[str, ...] = field(default=(), compare=False)

    @property
    def size(self) -> int:
        """Characters of text."""
        return sum(map(len, self.texts))

    @property
    def texts(self) -> tuple[str, ...]:
        """The text, or the contents of the messages."""
        return tuple(turn.content for turn in (*self.turns, *self.rejected[self.context :])) or (self.text,)

    @property
    def conversations(self) -> tuple[tuple[Turn, ...], ...]:
        """Its messages, of a pair those of the better and of the worse one."""
        return (self.turns, self.rejected) if self.rejected else (self.turns,)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the content."""
        turns = self.conversations if self.rejected else self.turns
        content = json.dumps(turns) if turns else self.text
        return hashlib.sha256(content.encode()).digest()


@dataclass(frozen=True)
class Bad:
    """Something that cannot be a document. where: file and line or row; what: the kind of problem; detail: may be
    empty.

    All three are safe to print: file and field names may contain non-UTF-8 bytes, newlines and terminal codes, which
    are escaped.
    """

    where: str
    what: str
    detail: str = ""

    def __post_init__(self) -> None:
        detail = self.detail if len(self.detail) <= _SHOWN else f"{self.detail[:_SHOWN]}..."
        for name, text in {"where": self.where, "what": self.what, "detail": detail}.items():
            object.__setattr__(self, name, printable(text))

    def __str__(self) -> str:
        return f"{self.where}: {self.what}{f' ({self.detail})' if self.detail else ''}"


class Records(Protocol):
    """How a record (a line of JSON, a row of a table) becomes a document; picklable."""

    @property
    def columns(self) -> tuple[tuple[str, ...], ...]:
        """Alternative sets of columns in order of preference: a table is read by the first set it has completely."""

    @property
    def optional(self) -> tuple[str, ...]:
        """Columns that are read too if present."""

    @property
    def texts(self) -> tuple[str, ...]:
        """Columns that hold nothing but a text."""

    def document(self, where: str, record: Mapping[str, Any]) -> Document | Bad:
        """The document of the record found at ``where``."""


@dataclass(frozen=True)
class TextRecords:
    """Records with a text in one field."""

    field: str
    optional = ()

    @property
    def columns(self) -> tuple[tuple[str, ...], ...]:
        return (self.texts,)

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.field,)

    def document(self, where: str, record: Mapping[str, Any]) -> Document | Bad:
        if self.field not in record:
            return Bad(where, f"no field {self.field!r}", f"it has {', '.join(map(str, record)) or 'none'}")
        text = record[self.field]
        if reason := not_text(text):
            return Bad(where, f"{self.field!r} is not text", reason)
        if not text:
            return Bad(where, "empty")
        return Document(where, text) if len(text) <= LONGEST else Bad(where, TOO_LONG, f"{len(text):,} characters")


def columns_of(records: Records, present: Sequence[str]) -> list[str] | None:
    """The columns to read of a table with the columns ``present``; None: it has none of the sets."""
    wanted = next((columns for columns in records.columns if set(columns) <= set(present)), None)
    return None if wanted is None else [*wanted, *(name for name in records.optional if name in present)]


def not_text(value: object) -> str | None:
    """Why ``value`` is not text, None if it is."""
    if isinstance(value, str):
        return None if encodable(value) else "half a surrogate pair"
    return type_name(value)


def type_name(value: object) -> str:
    """The type of a JSON value for messages."""
    return "null" if value is None else type(value).__name__


def encodable(text: str) -> bool:
    """Whether ``text`` can be encoded as UTF-8; JSON can contain half a surrogate pair, which cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Unit(Protocol):
    """A piece of a corpus that is read independently, in any order and in any process; picklable. Whatever it holds is
    covered by the fingerprint of the corpus."""

    @property
    def size(self) -> int:
        """Bytes of text, or an estimate: for progress only."""

    def documents(self) -> Iterator[Document | Bad]:
        """Its documents in order, streamed: memory is bounded by the longest document."""


@dataclass(frozen=True)
class Corpus:
    """All of a corpus, unread. fingerprint: SHA-256 (hex) of what the units hold, in order.

    named: the first ``named`` units are validation data and the others training data; None: documents of all units
    may be held out. one_text: the units are consecutive pieces of a single text. notes: lines about what is read.
    """

    units: Sequence[Unit]
    fingerprint: str
    named: int | None = None
    one_text: bool = False
    notes: tuple[str, ...] = ()
