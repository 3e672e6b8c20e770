"""Which documents, or which part of a lone one, are held out for validation.

A document is held out if a hash of its content (of its name for Python's standard library) is below
``data.val_fraction``, so that the choice does not change when a corpus grows and equal texts stay on one side. If that
leaves one side empty, the document nearest to it goes there. Of a single text the end is held out.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from hybridlm.data.reading.documents import Corpus, Document
from hybridlm.data.tokenizer.cuts import last_cut
from hybridlm.errors import UserError

Side = Literal["train", "val"]


class Refused(UserError):
    """The corpus itself cannot be used: nothing made from it is worth keeping."""


def position(document: Document) -> float:
    """The position in [0, 1) of a document, by a hash of its content or its key, independent of other documents."""
    # 53 bits, so that the quotient is exact in a double and never rounds up to 1.
    key = (document.key or document.digest.hex()).encode("utf-8", errors="surrogateescape")
    return (int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 11) / 2**53


@dataclass(frozen=True)
class Split:
    """below: documents at positions below it are held out. shares: if not empty, for each unit the share of every
    document's text that is held out, at its end; 0: none, 1: all."""

    below: float
    shares: tuple[float, ...] = ()

    @property
    def cuts(self) -> bool:
        """Whether documents are split in two."""
        return any(0 < share < 1 for share in self.shares)

    @property
    def all_learned(self) -> bool:
        """Whether nothing is held out."""
        return bool(self.shares) and not any(self.shares)

    def deal(self, unit: int, document: Document) -> Iterator[tuple[Side, Document]]:
        """The document of a unit, or its two parts, each with its side."""
        share = self.shares[unit] if self.shares else float(position(document) < self.below)
        if share in (0, 1) or len(document.text) < 2:
            yield ("val" if share == 1 else "train"), document
            return
        at = last_cut(document.text, round((1 - share) * len(document.text)))
        yield "train", replace(document, text=document.text[:at])
        yield "val", replace(document, text=document.text[at:])


def find_split(corpus: Corpus, fraction: float) -> Split:
    """Reads documents until there is one on either side, which in a small corpus may be all of them.

    Refused: the corpus is a single conversation.
    """
    if corpus.named is not None:
        return Split(fraction, tuple(1.0 if unit < corpus.named else 0.0 for unit in range(len(corpus.units))))
    if corpus.one_text:
        return Split(fraction, _ends([unit.size for unit in corpus.units], fraction))
    least, most, turns = 1.0, -1.0, False
    both = (document for unit in corpus.units for document in unit.documents())
    for document in (one for one in both if isinstance(one, Document)):
        place, turns = position(document), turns or bool(document.turns)
        least, most = min(least, place), max(most, place)
        if least < fraction <= most:
            return Split(fraction)
    if least < most:  # all on one side
        return Split(most if most < fraction else math.nextafter(least, 1))
    if turns:
        raise Refused(
            "the corpus is a single conversation, which cannot be split: add others, or name validation data with"
            " data.val_path"
        )
    return Split(fraction, (fraction,) * len(corpus.units))


def _ends(sizes: list[int], fraction: float) -> tuple[float, ...]:
    """For the pieces of one text the share of each that is in its last ``fraction``."""
    shares, at, begin = [], (1 - fraction) * sum(sizes), 0
    for size in sizes:
        shares.append(min(1.0, max(0.0, (begin + size - at) / size)) if size else 0.0)
        begin += size
    return tuple(shares)
