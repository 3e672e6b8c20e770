"""One unit of a corpus made into token files: what every worker process does.

A unit's files are complete once its report lies beside them; whatever is there without a report is made again.
"""

from __future__ import annotations

import contextlib
import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import tee
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from hybridlm.config.section import Section
from hybridlm.data.chat import encode_conversations, template_of
from hybridlm.data.files.bins import MAX_TOKENS, BinMeta, BinWriter
from hybridlm.data.keep import replace_text
from hybridlm.data.preparing.split import Refused, Side, Split
from hybridlm.data.reading.documents import Bad, Document
from hybridlm.data.reading.units import Unit
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.data.tokenizer_pieces import LONGEST_PART

NO_CUT = (
    f"more than {LONGEST_PART:,} characters without a blank, a line end or a mark (data.tokenizer.kind=bytes takes"
    " them)"
)
_ROLL_AT = MAX_TOKENS - (1 << 28)  # tokens: no single document is that long


def refusal(bad: Bad) -> Refused:
    """That of ``data.on_bad=fail``."""
    return Refused(f"data.on_bad=fail: {bad}; mend it, or leave such documents out with data.on_bad=skip")


class Mistakes(Section):
    """How often a kind of mistake was met, and where first."""

    what: str
    count: int
    first: str
    detail: str


class UnitReport(Section):
    """What became of a unit. train, val: its token files by stem, in order."""

    documents: int  # that went into a token file
    duplicates: int
    mistakes: tuple[Mistakes, ...]
    train: dict[str, BinMeta]
    val: dict[str, BinMeta]


@dataclass(frozen=True)
class Task:
    """What is to be done with every unit; can be pickled. folder: of the token files; masked: the corpus is of
    conversations."""

    folder: Path
    tokenizer: Path
    masked: bool
    split: Split
    fail_on_bad: bool
    shard_bytes: int

    def report_path(self, number: int) -> Path:
        return self.folder / f"unit-{number:06d}.json"

    def report(self, number: int) -> UnitReport | None:
        """That of a unit which was finished, maybe by an earlier process."""
        try:
            return UnitReport.model_validate_json(self.report_path(number).read_bytes())
        except (OSError, ValidationError):
            return None


@dataclass
class _Tally:
    """What a pass over a unit counts on the way."""

    documents: int = 0
    duplicates: int = 0
    mistakes: dict[str, Mistakes] = field(default_factory=dict)

    def bad(self, bad: Bad) -> None:
        met = self.mistakes.get(bad.what)
        if met is None:
            self.mistakes[bad.what] = Mistakes(what=bad.what, count=1, first=bad.where, detail=bad.detail)
        else:
            self.mistakes[bad.what] = met.model_copy(update={"count": met.count + 1})


def tokenise(
    task: Task,
    number: int,
    unit: Unit,
    tokenizer: Tokenizer,
    dropped: np.ndarray | None = None,
    progress: Callable[[int], None] | None = None,
) -> UnitReport:
    """Makes the token files of unit ``number`` and its report.

    dropped: (documents,) bool, what is left out because it came before; progress gets numbers of bytes of text as they
    are read. Refused: with ``fail_on_bad`` there is something bad. OSError: a file cannot be written.
    """
    tally = _Tally()
    chosen = _chosen(task, unit, tokenizer, tally, dropped, progress or (lambda n: None))
    read, again = tee(part for document in chosen for part in task.split.deal(number, document))
    with contextlib.ExitStack() as stack:
        sides: dict[Side, _Side] = {"train": _Side(task, f"train-{number:06d}", tokenizer, stack)}
        sides["val"] = _Side(task, f"val-{number:06d}", tokenizer, stack)
        documents = (document for _, document in again)
        for (side, _), (ids, learned, text_bytes) in zip(
            read, _encoded(documents, tokenizer, task.masked), strict=True
        ):
            sides[side].add(ids, learned, text_bytes)
        report = UnitReport(
            documents=tally.documents,
            duplicates=tally.duplicates,
            mistakes=tuple(tally.mistakes.values()),
            train=sides["train"].finish(),
            val=sides["val"].finish(),
        )
    replace_text(task.report_path(number), json.dumps(report.model_dump(mode="json")))
    return report


def _chosen(
    task: Task,
    unit: Unit,
    tokenizer: Tokenizer,
    tally: _Tally,
    dropped: np.ndarray | None,
    progress: Callable[[int], None],
) -> Iterator[Document]:
    number = -1  # among the documents
    for document in unit.documents():
        found = document
        if isinstance(document, Document):
            number += 1
            progress(document.size)
            if dropped is not None and dropped[number]:
                tally.duplicates += 1
                continue
            found = _encodable(document, tokenizer)
        if isinstance(found, Document):
            tally.documents += 1
            yield found
        elif task.fail_on_bad:
            raise refusal(found)
        else:
            tally.bad(found)


def _encodable(document: Document, tokenizer: Tokenizer) -> Document | Bad:
    length = next((length for text in document.texts if (length := tokenizer.too_long(text))), 0)
    return Bad(document.name, NO_CUT, f"{length:,} characters") if length else document


def _encoded(
    documents: Iterable[Document], tokenizer: Tokenizer, masked: bool
) -> Iterator[tuple[np.ndarray, np.ndarray | None, int]]:
    """For each document its ids, what is learned of them, and the bytes of text behind what is learned."""
    if masked:
        sizes = tokenizer.token_bytes()
        for ids, learned in encode_conversations(documents, tokenizer, template_of(tokenizer)):
            yield ids, learned, int(sizes[ids[learned]].sum())
        return
    read, again = tee(documents)
    for document, ids in zip(read, tokenizer.encode_documents(document.text for document in again), strict=True):
        # What the ids stand for.
        text = document.text if tokenizer.lossless else unicodedata.normalize("NFC", document.text)
        yield ids, None, len(text.encode())


class _Side:
    """The training or the validation documents of a unit, in as many files as they need."""

    def __init__(self, task: Task, stem: str, tokenizer: Tokenizer, stack: contextlib.ExitStack) -> None:
        self._task, self._stem, self._tokenizer, self._stack = task, stem, tokenizer, stack
        self._fingerprint = tokenizer.fingerprint
        self._writer: BinWriter | None = None
        self._held = 0  # bytes of text in the open file
        self._done: dict[str, BinMeta] = {}

    def add(self, ids: np.ndarray, learned: np.ndarray | None, text_bytes: int) -> None:
        # A unit is of about this size by itself, but for what can only be read whole: a .gz, a file of a streamed data
        # set.
        if self._writer is not None and (self._held >= 2 * self._task.shard_bytes or self._writer.count >= _ROLL_AT):
            self._close()
        if self._writer is None:
            self._writer = self._stack.enter_context(
                BinWriter(
                    self._task.folder / f"{self._name()}.bin",
                    eos_id=self._tokenizer.eos_id,
                    vocab_size=self._tokenizer.vocab_size,
                    tokenizer=self._fingerprint,
                    masked=self._task.masked,
                )
            )
        self._writer.add(ids, text_bytes, learned)
        self._held += text_bytes

    def finish(self) -> dict[str, BinMeta]:
        self._close()
        return self._done

    def _name(self) -> str:
        return f"{self._stem}-{len(self._done):02d}"

    def _close(self) -> None:
        if self._writer is not None:
            self._done[self._name()] = self._writer.finish()
        self._writer, self._held = None, 0
