"""Files cut into units without reading them twice: where each is cut, and the hash of what it holds.

What was found is kept with each file's size and time, so a corpus of any size that has not changed costs a look at its
folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, NamedTuple

from hybridlm.data.keep import keep_json, kept_json
from hybridlm.data.reading import documents
from hybridlm.data.reading.documents import Bad, Records
from hybridlm.data.reading.file_units import Broken, Lines, Rows, SourceFile, Texts, TextSlice, Zipped
from hybridlm.data.reading.readers import NOT_PARQUET, kind_of, parquet_problem, unreadable
from hybridlm.data.reading.units import Corpus, Unit

_BLOCK = 1 << 22  # bytes
_SETTLED = 2e9  # nanoseconds after which a file that changes again shows another time


class Cut(NamedTuple):
    """A piece of a file: bytes of text, row groups of Parquet. first: number of its first line, row or piece; size: in
    bytes."""

    begin: int
    end: int
    first: int
    size: int


@dataclass(frozen=True)
class Scan:
    """What was found in a file of this size and time (nanoseconds). sha256: empty if the system did not give it to
    us."""

    size: int
    changed: int
    sha256: str
    cuts: tuple[Cut, ...]
    broken: tuple[str, str] | None = None  # what is wrong with all of it, and more of that


class _Stopped(Exception):
    """The user has had enough."""


def scan_files(
    files: Sequence[SourceFile],
    records: Records,
    unit_bytes: int,
    kept: Path,
    progress: Callable[[int], None] = lambda n: None,
    *,
    python: bool = False,
) -> Corpus:
    """A corpus of ``files`` in units of about ``unit_bytes`` of text. kept: the file for what is found.

    progress gets numbers of bytes read, never from two threads at a time.
    """
    old = {name: scan for name, facts in kept_json(kept).items() if (scan := _scan_of(facts)) is not None}
    settled = time.time_ns() - _SETTLED  # from before the first look, as one file may change while others are read
    scans = _scans(files, old, unit_bytes, progress)
    new = {file.name: scan for file, scan in zip(files, scans, strict=True) if scan.sha256 and scan.changed < settled}
    if new != old:
        keep_json(
            kept, {name: [scan.size, scan.changed, scan.sha256, scan.cuts, scan.broken] for name, scan in new.items()}
        )
    return Corpus(
        list(_units(files, scans, records, unit_bytes, python)), _fingerprint(files, scans, records, unit_bytes, python)
    )


def _scans(
    files: Sequence[SourceFile], old: dict[str, Scan], unit_bytes: int, progress: Callable[[int], None]
) -> list[Scan]:
    lock, stop = threading.Lock(), threading.Event()

    def advance(size: int) -> None:
        if stop.is_set():
            raise _Stopped
        with lock:
            progress(size)

    def scanned(file: SourceFile) -> Scan:
        known, now = old.get(file.name), _stat(file.path)
        # Whether it can be read is no part of its time.
        if (
            known is not None
            and now is not None
            and (known.size, known.changed) == (now.st_size, now.st_mtime_ns)
            and os.access(file.path, os.R_OK)
        ):
            return known
        return _scan(file, now, unit_bytes, advance)

    # Hashing and reading release the interpreter's lock.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            return list(pool.map(scanned, files))
        finally:
            stop.set()  # else a Ctrl-C would wait until the files under way are read


def _scan_of(facts: object) -> Scan | None:
    """What ``scan_files`` has kept of a file; None: it is damaged."""
    match facts:
        case [int(size), int(changed), str(sha256), list(cuts), ([str(), str()] | None) as broken] if sha256:
            try:
                found = tuple(Cut(*cut) for cut in cuts)
            except TypeError:
                return None
            place = 0
            for cut in found:
                if (
                    not all(type(number) is int and number >= 0 for number in cut)
                    or not place == cut.begin <= cut.end <= size
                ):
                    return None
                place = cut.end
            if bool(found) == (broken is None):
                return Scan(size, changed, sha256, found, None if broken is None else (broken[0], broken[1]))
    return None


def _fingerprint(
    files: Sequence[SourceFile], scans: Sequence[Scan], records: Records, unit_bytes: int, python: bool
) -> str:
    digest = hashlib.sha256(f"{records!r}/{unit_bytes}/{documents.LONGEST}/{python}".encode())
    for file, scan in zip(files, scans, strict=True):
        # Not how the mistake is put, which is another in another version of a library or language.
        digest.update(json.dumps([file.name, scan.sha256, scan.broken is not None]).encode())
    return digest.hexdigest()


def _units(
    files: Sequence[SourceFile], scans: Sequence[Scan], records: Records, unit_bytes: int, python: bool
) -> Iterator[Unit]:
    """In the order of the files; short texts that follow each other share a unit."""
    together: list[SourceFile] = []
    size = 0

    def flushed() -> Iterator[Unit]:
        nonlocal together, size
        if together:
            yield Texts(tuple(together), size, python)
        together, size = [], 0

    for source, scan in zip(files, scans, strict=True):
        file = replace(source, seen=(scan.size, scan.changed))
        kind = "text" if python else kind_of(file.path)
        if kind == "text" and len(scan.cuts) == 1 and scan.broken is None:
            together.append(file)
            size += scan.size
            if size >= unit_bytes:
                yield from flushed()
            continue
        yield from flushed()
        if scan.broken is not None:
            yield Broken(Bad(file.name, *scan.broken))
            continue
        for cut in scan.cuts:
            if kind == "text":
                yield TextSlice(file, cut.begin, cut.end, cut.first)
            elif kind == "lines":
                yield Lines(file, records, cut.begin, cut.end, cut.first)
            elif kind == "zipped":
                yield Zipped(file, records, cut.size)
            else:
                yield Rows(file, records, (cut.begin, cut.end), cut.first, cut.size)
    yield from flushed()


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _scan(file: SourceFile, now: os.stat_result | None, unit_bytes: int, progress: Callable[[int], None]) -> Scan:
    kind = kind_of(file.path)
    size, changed = (0, 0) if now is None else (now.st_size, now.st_mtime_ns)
    try:
        with file.path.open("rb") as opened:
            sha256, cuts = _read(opened, unit_bytes if kind == "lines" else None, progress)
            if kind == "text":
                cuts = _text_cuts(opened, cuts[0].size, documents.LONGEST)
        if kind == "parquet":
            found = _row_groups(file.path, unit_bytes)
            if isinstance(found, str):
                return Scan(size, changed, sha256, (), (NOT_PARQUET, found))
            cuts = found
    except OSError as error:
        bad = unreadable(file.name, error)
        return Scan(size, changed, "", (), (bad.what, bad.detail))
    return Scan(size, changed, sha256, tuple(cuts))


def _read(file: IO[bytes], limit: int | None, progress: Callable[[int], None]) -> tuple[str, list[Cut]]:
    """SHA-256 (hex) of a file, and its pieces: each ends with the first line end at ``limit`` bytes or more; None: it
    is not cut."""
    digest = hashlib.sha256()
    cuts: list[Cut] = []
    begin = place = 0
    first = line = 1
    while block := file.read(_BLOCK):
        digest.update(block)
        done = 0  # of the block
        while limit is not None:
            found = block.find(b"\n", max(done, begin + limit - 1 - place))
            if found < 0:
                break
            line += block.count(b"\n", done, found + 1)
            done = found + 1
            cuts.append(Cut(begin, place + done, first, place + done - begin))
            begin, first = place + done, line
        line += block.count(b"\n", done) if limit is not None else 0
        place += len(block)
        progress(len(block))
    if place > begin or not cuts:
        cuts.append(Cut(begin, place, first, place - begin))
    return digest.hexdigest(), cuts


def _text_cuts(file: IO[bytes], size: int, limit: int) -> list[Cut]:
    """Pieces of a text that are a document each, of ``limit`` to twice as many bytes but for the last."""
    cuts: list[Cut] = []
    begin = 0
    while begin < size or not cuts:
        end = size if size - begin <= limit else _text_end(file, begin + limit, min(begin + 2 * limit, size), size)
        cuts.append(Cut(begin, end, len(cuts) + 1, end - begin))
        begin = end
    return cuts


def _text_end(file: IO[bytes], first: int, last: int, size: int) -> int:
    """Where a piece ends, between the bytes ``first`` and ``last`` of the file, about: behind a line end, else before a
    blank, else between two characters of UTF-8."""
    blank, place = -1, first - 1
    file.seek(place)
    while place < last and (block := file.read(min(_BLOCK, last - place))):
        if (found := block.find(b"\n")) >= 0:
            return place + found + 1
        if blank < 0 and (found := block.find(b" ")) >= 0:
            blank = place + found
        place += len(block)
    if last == size or blank >= 0:
        return size if last == size else blank
    file.seek(last)
    return last + next((number for number, byte in enumerate(file.read(4)) if byte & 0xC0 != 0x80), 0)


def _row_groups(path: Path, unit_bytes: int) -> list[Cut] | str:
    """Consecutive row groups of a Parquet file, of about ``unit_bytes`` together; or why they cannot be had."""
    from pyarrow import parquet

    try:
        with path.open("rb") as opened, parquet.ParquetFile(opened) as file:
            groups = [file.metadata.row_group(group) for group in range(file.metadata.num_row_groups)]
            sizes = [(group.num_rows, group.total_byte_size) for group in groups]
    except Exception as error:
        problem = parquet_problem(error)
        if problem is None:
            raise
        return problem
    if not any(rows for rows, _ in sizes):
        return [Cut(0, 0, 1, 0)]
    cuts: list[Cut] = []
    begin = size = 0
    first = row = 1
    for number, (rows, group_bytes) in enumerate(sizes, 1):
        size, row = size + group_bytes, row + rows
        if size >= unit_bytes or number == len(sizes):
            cuts.append(Cut(begin, number, first, size))
            begin, size, first = number, 0, row
    return cuts
