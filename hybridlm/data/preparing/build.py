"""A corpus made into a folder of token files, by several processes, in steps that survive being killed.

The folder is named after all that its content depends on and grows under another name. A unit that is finished there
stays finished, so a second start goes on where the first was killed, with the same files byte for byte; once complete
it is renamed into place.
"""

from __future__ import annotations

import gzip
import json
import lzma
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from hybridlm.config.section import Section
from hybridlm.data.chat import template_of
from hybridlm.data.files.bins import BinMeta, open_bin
from hybridlm.data.keep import replace_text, unwritable
from hybridlm.data.preparing import duplicates
from hybridlm.data.preparing.pool import Work, work_on
from hybridlm.data.preparing.split import Refused, Split
from hybridlm.data.preparing.tokenise import Mistakes, Task, UnitReport, tokenise
from hybridlm.data.progress import ByteProgress
from hybridlm.data.reading.units import Corpus, Unit
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import UserError

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
_MEASURED = 4_000_000  # bytes of validation text; xz takes a second or two for one million
Report = Callable[[str], None]


class Manifest(Section):
    """What a prepared folder holds. train, val: its token files by stem, in order of the corpus. below: the place in
    the split up to which documents are held out; cut: each document gives its end instead."""

    format_version: int
    tokenizer: str  # Tokenizer.fingerprint
    documents: int
    duplicates: int
    mistakes: tuple[Mistakes, ...]
    train: dict[str, BinMeta]
    val: dict[str, BinMeta]
    gzip_bytes: int | None
    xz_bytes: int | None
    below: float
    cut: bool


@dataclass(frozen=True)
class Order:
    """What is to be built. name: of the corpus, for the screen; split: what finds it, which may read the corpus."""

    name: str
    corpus: Corpus
    tokenizer: Tokenizer
    folder: Path
    masked: bool
    dedup: bool
    fail_on_bad: bool
    split: Callable[[], Split]
    shard_bytes: int
    workers: int

    @property
    def unfinished(self) -> Path:
        # Beside the final folder, so that the rename stays within one file system.
        return self.folder.parent / f".{self.folder.name}.unfinished"


def build(order: Order, report: Report) -> None:
    """Makes ``order.folder`` unless it is there; of two processes that want it one waits for the other.

    ConfigError: the corpus cannot be split, holds nothing or, if that was asked for, something bad; or nothing can be
    written.
    """
    locks = order.folder.parent / "locks"
    try:
        locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(locks / f"{order.folder.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            report("another process prepares this corpus; waiting for it")
            lock.acquire()
        try:
            if not order.folder.exists():
                _build(order, report)
        finally:
            lock.release()
    except OSError as error:
        raise unwritable(order.folder, error) from None


def _build(order: Order, report: Report) -> None:
    folder = order.unfinished
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MANIFEST).exists():
        order.tokenizer.save(folder / TOKENIZER)
        if order.masked:
            template_of(order.tokenizer).save(folder)
        try:
            task = Task(folder, folder / TOKENIZER, order.masked, order.split(), order.fail_on_bad, order.shard_bytes)
            if order.dedup:
                _find_duplicates(order, folder, report)
            manifest = _merged(order, task.split, _tokenised(order, task, report), report)
        except Refused:  # another corpus will have another folder
            shutil.rmtree(folder, ignore_errors=True)
            raise
        replace_text(folder / MANIFEST, json.dumps(manifest.model_dump(mode="json")))
    for number in range(len(order.corpus.units)):
        (folder / f"unit-{number:06d}.json").unlink(missing_ok=True)
    duplicates.remove_marks(folder, len(order.corpus.units))
    os.replace(folder, order.folder)


@dataclass(frozen=True)
class _Digests:
    """The first step of deduplication."""

    folder: Path

    def begin(self) -> None:
        pass

    def do(self, number: int, unit: Unit, progress: Callable[[int], None]) -> None:
        duplicates.write_digests(self.folder, number, unit, progress)


class _Tokens:
    """The main step."""

    def __init__(self, task: Task, dedup: bool) -> None:
        self._task, self._dedup = task, dedup
        self._tokenizer: Tokenizer | None = None

    def begin(self) -> None:
        self._tokenizer = Tokenizer.load(self._task.tokenizer)

    def do(self, number: int, unit: Unit, progress: Callable[[int], None]) -> None:
        assert self._tokenizer is not None
        dropped = duplicates.dropped_of(self._task.folder, number) if self._dedup else None
        tokenise(self._task, number, unit, self._tokenizer, dropped, progress)


def _find_duplicates(order: Order, folder: Path, report: Report) -> None:
    units = order.corpus.units
    _run("looking for duplicates", _Digests(folder), order, list(enumerate(units)), report)
    duplicates.mark_duplicates(folder, len(units))


def _tokenised(order: Order, task: Task, report: Report) -> list[UnitReport]:
    units = order.corpus.units
    reports = {number: task.report(number) for number in range(len(units))}
    todo = [(number, unit) for number, unit in enumerate(units) if reports[number] is None]
    if len(todo) < len(units):
        report(f"{len(units) - len(todo)} of {len(units)} pieces are tokenised already")
    _run("tokenising", _Tokens(task, order.dedup), order, todo, report)
    finished = [reports[number] or task.report(number) for number in range(len(units))]
    if lost := [number for number, one in enumerate(finished) if one is None]:
        raise UserError(
            f"{task.report_path(lost[0])} cannot be read back just after it was written: is the disk in order?"
        )
    return [one for one in finished if one is not None]


def _run(what: str, work: Work, order: Order, todo: Sequence[tuple[int, Unit]], report: Report) -> None:
    total = sum(unit.size for unit in order.corpus.units)  # 0: nobody knows
    before = total - sum(unit.size for _, unit in todo)
    with ByteProgress(f"{order.name}: {what}", total, report) as progress:
        progress.update(before)
        work_on(work, todo, order.workers, lambda done: progress.update(before + done))


def _merged(order: Order, split: Split, reports: Sequence[UnitReport], report: Report) -> Manifest:
    kinds: dict[str, Mistakes] = {}
    for mistake in (mistake for one in reports for mistake in one.mistakes):
        met = kinds.get(mistake.what)
        kinds[mistake.what] = mistake if met is None else met.model_copy(update={"count": met.count + mistake.count})
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        tokenizer=order.tokenizer.fingerprint,
        documents=sum(one.documents for one in reports),
        duplicates=sum(one.duplicates for one in reports),
        mistakes=tuple(sorted(kinds.values(), key=lambda mistake: mistake.count, reverse=True)),
        train={stem: meta for one in reports for stem, meta in one.train.items()},
        val={stem: meta for one in reports for stem, meta in one.val.items()},
        gzip_bytes=None,
        xz_bytes=None,
        below=split.below,
        cut=split.cuts,
    )
    if not manifest.documents and manifest.mistakes:
        first = manifest.mistakes[0]
        bad = sum(mistake.count for mistake in manifest.mistakes)
        raise Refused(
            f"{order.name}: none of its {bad} document(s) can be used; the first: {first.first}: {first.what}"
        )
    if not manifest.train or not (manifest.val or split.all_learned):
        lacking = "train on" if not manifest.train else "validate on"
        raise Refused(
            f"{order.name}: nothing to {lacking}: {manifest.documents} document(s) with text are too few, or of one"
            " side alone"
        )
    began = time.monotonic()
    gzip_bytes, xz_bytes = (None, None) if order.masked else _compressed(order, manifest)
    if time.monotonic() - began > 5:
        report(f"compressed the validation text for comparison in {time.monotonic() - began:.0f} s")
    return manifest.model_copy(update={"gzip_bytes": gzip_bytes, "xz_bytes": xz_bytes})


def _compressed(order: Order, manifest: Manifest) -> tuple[int | None, int | None]:
    """Sizes in bytes that general-purpose compressors make of the validation text, the yardstick for bits per byte;
    None: it is long."""
    if sum(meta.text_bytes for meta in manifest.val.values()) > _MEASURED:
        return None, None
    pieces = [order.tokenizer.bytes_of(token) for token in range(order.tokenizer.vocab_size)]
    files = [open_bin(order.unfinished / f"{stem}.bin", meta, verify=False) for stem, meta in manifest.val.items()]
    text = b"".join(pieces[token] for file in files for token in np.asarray(file.tokens).tolist())
    return len(gzip.compress(text, compresslevel=9, mtime=0)), len(lzma.compress(text, preset=9))
