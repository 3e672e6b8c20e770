"""One unit of a corpus made into token files: what every worker process does.

A unit's files are complete once its report is next to them; files without a report are made again.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, tee
from pathlib import Path
from typing import get_args

import numpy as np
from pydantic import ValidationError

from hybridlm.config.section import Section
from hybridlm.data.chat import encode_conversations, template_of
from hybridlm.data.files.bins import MAX_TOKENS, BinMeta, BinWriter
from hybridlm.data.keep import replace_text
from hybridlm.data.preparing.duplicates import dropped_of
from hybridlm.data.preparing.split import Refused, Side, Split
from hybridlm.data.reading.documents import Bad, Document, Unit
from hybridlm.data.tokenizer import Tokenizer

_ROLL_AT = MAX_TOKENS - (1 << 28)  # tokens: no single document is that long


def refusal(bad: Bad) -> Refused:
    """The error of ``data.on_bad=fail``."""
    return Refused(f"data.on_bad=fail: {bad}; fix it, or skip such documents with data.on_bad=skip")


class Problem(Section):
    """How often a kind of bad document was found, and where first."""

    what: str
    count: int
    first: str
    detail: str


class Contents(Section):
    """What became of a unit or a corpus. forms: of the records of conversations, and how many had each; train, val: its
    token files by stem, in order."""

    documents: int  # in the token files
    forms: dict[str, int] = {}
    duplicates: int
    mistakes: tuple[Problem, ...]
    train: dict[str, BinMeta]
    val: dict[str, BinMeta]


def count_problem(found: dict[str, Problem], problem: Problem) -> None:
    """Add to the problems ``found``, by kind."""
    count = problem.count + (found[problem.what].count if problem.what in found else 0)
    found[problem.what] = found.get(problem.what, problem).model_copy(update={"count": count})


@dataclass(frozen=True)
class Task:
    """What to do with every unit; picklable. folder: of the token files; masked: the corpus consists of conversations;
    dedup: duplicates are marked in the folder."""

    folder: Path
    tokenizer: Path
    masked: bool
    split: Split
    fail_on_bad: bool
    dedup: bool
    shard_bytes: int

    def report_path(self, number: int) -> Path:
        return self.folder / f"unit-{number:06d}.json"

    def report(self, number: int) -> Contents | None:
        """That of a unit which is finished, maybe by an earlier process."""
        try:
            return Contents.model_validate_json(self.report_path(number).read_bytes())
        except (OSError, ValidationError):
            return None


_loaded = lru_cache(maxsize=1)(Tokenizer.load)  # once per process


def tokenise(task: Task, number: int, unit: Unit, progress: Callable[[int], None] = lambda n: None) -> Contents:
    """Makes the token files of unit ``number`` and its report.

    progress gets numbers of bytes of text as they are read. Refused: with ``fail_on_bad`` there is a bad document.
    OSError: a file cannot be written.
    """
    tokenizer, counts, forms = _loaded(task.tokenizer), Counter[str](), Counter[str]()
    problems = dict[str, Problem]()
    chosen = _chosen(task, number, unit, counts, problems, progress)
    read, again = tee(part for document in chosen for part in task.split.deal(number, document))
    with contextlib.ExitStack() as stack:
        sides = {side: _Side(task, f"{side}-{number:06d}", tokenizer, stack) for side in get_args(Side)}
        encoded = _encoded((document for _, document in again), tokenizer, task.masked)
        for side, document in read:
            forms.update(document.forms)
            sides[side].add(list(islice(encoded, len(document.conversations))))
        report = Contents(
            documents=counts["documents"],
            forms=dict(forms),
            duplicates=counts["duplicates"],
            mistakes=tuple(problems.values()),
            train=sides["train"].finish(),
            val=sides["val"].finish(),
        )
    replace_text(task.report_path(number), json.dumps(report.model_dump(mode="json")))
    return report


def _chosen(
    task: Task,
    number: int,
    unit: Unit,
    counts: Counter[str],
    problems: dict[str, Problem],
    progress: Callable[[int], None],
) -> Iterator[Document]:
    """The documents to tokenise; the others are counted."""
    dropped = iter(dropped_of(task.folder, number) if task.dedup else ())
    for document in unit.documents():
        if isinstance(document, Document):
            progress(document.size)
            kind = "duplicates" if next(dropped, False) else "documents"
            counts[kind] += 1
            if kind == "documents":
                yield document
        elif task.fail_on_bad:
            raise refusal(document)
        else:
            count_problem(problems, Problem(what=document.what, count=1, first=document.where, detail=document.detail))


def _encoded(
    documents: Iterable[Document], tokenizer: Tokenizer, masked: bool
) -> Iterator[tuple[np.ndarray, np.ndarray | None, int]]:
    """For each document, or each of its conversations, its ids, which of them are learned, and the bytes of text behind
    the learned ones."""
    sizes = tokenizer.token_bytes()
    if masked:
        for ids, learned in encode_conversations(documents, tokenizer, template_of(tokenizer)):
            yield ids, learned, int(sizes[ids[learned]].sum())
    else:
        for ids in tokenizer.encode_documents(document.text for document in documents):
            yield ids, None, int(sizes[ids].sum())


class _Side:
    """The training or the validation documents of a unit, in as many files as they need."""

    def __init__(self, task: Task, stem: str, tokenizer: Tokenizer, stack: contextlib.ExitStack) -> None:
        self._task, self._stem, self._tokenizer, self._stack = task, stem, tokenizer, stack
        self._writer: BinWriter | None = None
        self._done: dict[str, BinMeta] = {}

    def add(self, sequences: Sequence[tuple[np.ndarray, np.ndarray | None, int]]) -> None:
        """One after the other in one file."""
        # A unit has about this size by itself, except for what can only be read whole: a .gz, a streamed file.
        writer = self._writer
        if writer is not None and (writer.text_bytes >= 2 * self._task.shard_bytes or writer.count >= _ROLL_AT):
            self.finish()
        if self._writer is None:
            self._writer = self._stack.enter_context(
                BinWriter(
                    self._task.folder / f"{self._name()}.bin",
                    eos_id=self._tokenizer.eos_id,
                    vocab_size=self._tokenizer.vocab_size,
                    tokenizer=self._tokenizer.fingerprint,
                    masked=self._task.masked,
                )
            )
        for ids, learned, text_bytes in sequences:
            self._writer.add(ids, text_bytes, learned)

    def finish(self) -> dict[str, BinMeta]:
        """Closes the open file. All files of this side by stem."""
        if self._writer is not None:
            self._done[self._name()] = self._writer.finish()
        self._writer = None
        return self._done

    def _name(self) -> str:
        return f"{self._stem}-{len(self._done):02d}"
