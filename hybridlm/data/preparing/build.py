"""A corpus made into a folder of token files, by several processes, in steps that survive being killed.

The folder is named after everything its content depends on and is built under another name. A finished unit stays
finished, so a second start continues where the first was killed and gives the same files byte for byte; the complete
folder is renamed into place.
"""

from __future__ import annotations

import gzip
import json
import lzma
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from filelock import FileLock, Timeout

from hybridlm.config.data import CorpusConfig
from hybridlm.data.chat import template_of
from hybridlm.data.files.bins import open_bin
from hybridlm.data.keep import replace_text, unwritable
from hybridlm.data.preparing import duplicates
from hybridlm.data.preparing.pool import Work, work_on
from hybridlm.data.preparing.split import Refused, Split, find_split
from hybridlm.data.preparing.tokenise import Contents, Problem, Task, count_problem, tokenise
from hybridlm.data.progress import ByteProgress
from hybridlm.data.reading.documents import Corpus, Unit
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import UserError

FORMAT_VERSION = 3
CONVERSATIONS_VERSION = 2  # of how records become conversations
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
_MEASURED = 4_000_000  # bytes of validation text; xz takes a second or two for one million
Report = Callable[[str], None]


class Manifest(Contents):
    """What a prepared folder holds, in order of the corpus. below: position in the split below which documents are held
    out; cut: instead, the end of each document is."""

    format_version: int
    tokenizer: str  # Tokenizer.fingerprint
    gzip_bytes: int | None
    xz_bytes: int | None
    below: float
    cut: bool


@dataclass(frozen=True)
class Source:
    """A corpus to be prepared: the only one, or a part of a mixture. weight: of its text in tokenizer training."""

    name: str
    weight: float
    config: CorpusConfig
    corpus: Corpus
    val_fraction: float

    @cached_property
    def split(self) -> Split:
        """What is held out; finding it may read the corpus."""
        return find_split(self.corpus, self.val_fraction)

    @property
    def split_facts(self) -> list[object]:
        """What the split depends on besides the corpus."""
        return ["named", self.corpus.named] if self.corpus.named is not None else ["hash", self.val_fraction]

    @property
    def masked(self) -> bool:
        """Whether it consists of conversations, of which only some tokens are learned."""
        return self.config.format != "text"


def build(
    source: Source, tokenizer: Tokenizer, folder: Path, *, shard_bytes: int, workers: int, report: Report
) -> None:
    """Makes ``folder`` unless it exists; if two processes ask for it, one waits for the other.

    UserError: the corpus cannot be split, holds nothing or, with ``on_bad=fail``, a bad record; or nothing can be
    written.
    """
    locks = folder.parent / "locks"
    try:
        locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(locks / f"{folder.name}.lock")
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            report("waiting for another process that is preparing this corpus")
            held = lock.acquire()
        with held:
            if not folder.exists():
                _build(source, tokenizer, folder, shard_bytes, workers, report)
    except OSError as error:
        raise unwritable(folder, error) from None


def _build(source: Source, tokenizer: Tokenizer, folder: Path, shard_bytes: int, workers: int, report: Report) -> None:
    # Beside the final folder, so that the rename stays within one file system.
    unfinished = folder.parent / f".{folder.name}.unfinished"
    unfinished.mkdir(parents=True, exist_ok=True)
    units = list(enumerate(source.corpus.units))
    dedup, total = source.config.dedup, sum(unit.size for _, unit in units)  # 0: unknown

    def run(what: str, work: Work, todo: Sequence[tuple[int, Unit]]) -> None:
        before = total - sum(unit.size for _, unit in todo)
        with ByteProgress(f"{source.name}: {what}", total, report) as progress:
            work_on(work, todo, workers, lambda done: progress.update_to(before + done))

    if not (unfinished / MANIFEST).exists():
        tokenizer.save(unfinished / TOKENIZER)
        if source.masked:
            template_of(tokenizer).save(unfinished)
        try:
            fail_on_bad = source.config.on_bad == "fail"
            task = Task(
                unfinished, unfinished / TOKENIZER, source.masked, source.split, fail_on_bad, dedup, shard_bytes
            )
            if dedup:
                run("looking for duplicates", partial(duplicates.write_digests, unfinished), units)
                duplicates.mark_duplicates(unfinished, len(units))
            todo = [(number, unit) for number, unit in units if task.report(number) is None]
            if len(todo) < len(units):
                report(f"{len(units) - len(todo)} of {len(units)} pieces are already tokenised")
            run("tokenising", partial(tokenise, task), todo)
            manifest = _merged(source, tokenizer, task, report)
        except Refused:  # another corpus will have another folder
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        replace_text(unfinished / MANIFEST, json.dumps(manifest.model_dump(mode="json")))
    for path in unfinished.glob("unit-*"):
        path.unlink()
    os.replace(unfinished, folder)


def _merged(source: Source, tokenizer: Tokenizer, task: Task, report: Report) -> Manifest:
    found = [task.report(number) for number in range(len(source.corpus.units))]
    reports = [one for one in found if one is not None]
    if len(reports) < len(found):
        raise UserError(f"{task.folder}: files cannot be read back right after they were written: check the disk")
    problems = dict[str, Problem]()
    for problem in (problem for one in reports for problem in one.mistakes):
        count_problem(problems, problem)
    contents = Contents(
        documents=sum(one.documents for one in reports),
        forms=dict(sum((Counter(one.forms) for one in reports), Counter[str]())),
        duplicates=sum(one.duplicates for one in reports),
        mistakes=tuple(sorted(problems.values(), key=lambda problem: problem.count, reverse=True)),
        train={stem: meta for one in reports for stem, meta in one.train.items()},
        val={stem: meta for one in reports for stem, meta in one.val.items()},
    )
    if not contents.documents and contents.mistakes:
        first, bad = contents.mistakes[0], sum(problem.count for problem in contents.mistakes)
        raise Refused(
            f"{source.name}: none of its {bad} document(s) can be used; the first: {first.first}: {first.what}"
        )
    if not contents.train or not (contents.val or task.split.all_learned):
        lacking = "train on" if not contents.train else "validate on"
        raise Refused(
            f"{source.name}: nothing to {lacking}: {contents.documents} document(s) with text are too few, or all on"
            " one side of the split"
        )
    began = time.monotonic()
    gzip_bytes, xz_bytes = (None, None) if source.masked else _compressed(task.folder, tokenizer, contents)
    if time.monotonic() - began > 5:
        report(f"compressed the validation text for comparison in {time.monotonic() - began:.0f} s")
    return Manifest(
        **dict(contents),
        format_version=FORMAT_VERSION,
        tokenizer=tokenizer.fingerprint,
        gzip_bytes=gzip_bytes,
        xz_bytes=xz_bytes,
        below=task.split.below,
        cut=task.split.cuts,
    )


def _compressed(folder: Path, tokenizer: Tokenizer, contents: Contents) -> tuple[int | None, int | None]:
    """Sizes in bytes of the validation text under general-purpose compressors, the yardstick for bits per byte; None:
    it is too long."""
    if sum(meta.text_bytes for meta in contents.val.values()) > _MEASURED:
        return None, None
    bytes_of = [tokenizer.bytes_of(token) for token in range(tokenizer.vocab_size)]
    files = [open_bin(folder / f"{stem}.bin", meta, verify=False) for stem, meta in contents.val.items()]
    text = b"".join(bytes_of[token] for file in files for token in file.tokens().tolist())
    return len(gzip.compress(text, compresslevel=9, mtime=0)), len(lzma.compress(text, preset=9))
