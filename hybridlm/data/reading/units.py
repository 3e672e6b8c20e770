"""A corpus in units: pieces of bounded size that are read one by one, in any order and in any process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from hybridlm.data.reading.documents import Bad, Document


class Unit(Protocol):
    """A piece of a corpus; can be pickled. Whatever it holds is in the corpus' fingerprint."""

    @property
    def size(self) -> int:
        """Bytes of text, or an estimate of them: for progress only."""

    def documents(self) -> Iterator[Document | Bad]:
        """What it holds, in order; a stream, so that memory is bounded by the longest document."""


@dataclass(frozen=True)
class Corpus:
    """All of a corpus, unread. fingerprint: SHA-256 (hex) of what its units hold and in which order.

    named: the first so many units are there to validate on and the others to train on; None: documents of all of them
    are held out. one_text: the units are the consecutive pieces of a single text. notes: lines for the user about what
    is read.
    """

    units: Sequence[Unit]
    fingerprint: str
    named: int | None = None
    one_text: bool = False
    notes: tuple[str, ...] = ()
