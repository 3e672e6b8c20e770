"""Files cut into units: where each file is cut, and the hash of its content.

The result is cached with each file's size and modification time, so that opening an unchanged corpus of any size only
lists its folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import IO, NamedTuple

from hybridlm.config.data import CorpusConfig
from hybridlm.data.keep import cache_name, keep_json, kept_json
from hybridlm.data.reading import documents
from hybridlm.data.reading.documents import Bad, Corpus, Records, Unit
from hybridlm.data.reading.file_units import Broken, FilePart, SourceFile, Together
from hybridlm.data.reading.readers import kind_of, parquet_problem
from hybridlm.data.reading.records import records_of

_FORMAT = 2  # of the cached scans
_BLOCK = 1 << 22  # bytes
_SETTLED = 2e9  # nanoseconds after which another change of a file shows in its modification time
_LEAST, _ENOUGH = 8_000_000, 64  # bytes of a unit, units of a corpus
_UNZIPPED = 4  # text compresses to about a quarter


class Stretch(NamedTuple):
    """A piece of a file that is a unit: bytes [begin, end) of a text, rows [begin, end) of Parquet; end None: to the
    end. first: number of its first line or piece, 0: it is a whole text; size: in bytes."""

    begin: int
    end: int | None
    first: int
    size: int


class Scan(NamedTuple):
    """What was found in a file with this size and modification time (nanoseconds). sha256: empty if it cannot be read,
    for the reason ``problem``."""

    size: int
    changed: int
    sha256: str
    stretches: tuple[Stretch, ...] = ()
    problem: str = ""


def open_scanned(
    config: CorpusConfig,
    files: Sequence[SourceFile],
    place: str,
    unit_bytes: int,
    cache: Path,
    progress: Callable[[int], None],
) -> Corpus:
    """``scan_files`` with what the configuration says. place: identifies the set of files, for the cache."""
    # Some dozens of units in a corpus, so that many processes finish at about the same time; the size stays the same
    # until the corpus doubles, so that a growing corpus is not recut every time.
    total, even = 0, _LEAST
    for file in files:
        with contextlib.suppress(OSError):
            total += file.path.stat().st_size
    while even * _ENOUGH < total:
        even *= 2
    unit_bytes = min(unit_bytes, even)
    kept = cache / "scans" / f"{cache_name(place, unit_bytes, _FORMAT)}.json"
    return scan_files(files, records_of(config), unit_bytes, kept, progress, python=config.source == "stdlib")


def scan_files(
    files: Sequence[SourceFile],
    records: Records,
    unit_bytes: int,
    kept: Path,
    progress: Callable[[int], None] = lambda n: None,
    *,
    python: bool = False,
) -> Corpus:
    """A corpus of ``files`` in units of about ``unit_bytes`` of text. kept: the cache file for what is found.

    progress gets numbers of bytes read, never from two threads at a time.
    """
    old = {
        name: Scan(size, changed, sha256, tuple(Stretch(*one) for one in cuts))
        for name, (size, changed, sha256, cuts) in kept_json(kept).items()
    }
    settled = time.time_ns() - _SETTLED  # from before the first stat, as a file may change while others are read
    scans = _scans(files, old, unit_bytes, progress)
    new = {file.name: scan for file, scan in zip(files, scans, strict=True) if scan.sha256 and scan.changed < settled}
    if new != old:
        keep_json(kept, {name: scan[:-1] for name, scan in new.items()})
    digest = hashlib.sha256(f"{records!r}/{unit_bytes}/{documents.LONGEST}/{python}".encode())
    for file, scan in zip(files, scans, strict=True):
        digest.update(json.dumps([file.name, scan.sha256, not scan.sha256]).encode())
    return Corpus(_units(files, scans, records, unit_bytes, python), digest.hexdigest())


def _scans(
    files: Sequence[SourceFile], old: dict[str, Scan], unit_bytes: int, progress: Callable[[int], None]
) -> list[Scan]:
    lock, stop = threading.Lock(), threading.Event()

    def advance(size: int) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        with lock:
            progress(size)

    def scanned(file: SourceFile) -> Scan:
        known, now = old.get(file.name), _stat(file.path)
        # Permissions do not change the modification time.
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
            stop.set()  # otherwise Ctrl-C waits until the files in progress are read


def _units(
    files: Sequence[SourceFile], scans: Sequence[Scan], records: Records, unit_bytes: int, python: bool
) -> list[Unit]:
    """In the order of the files; consecutive short texts share a unit."""
    groups: list[list[Unit]] = []
    room = 0  # bytes that the last group still takes
    for source, scan in zip(files, scans, strict=True):
        file = replace(source, seen=(scan.size, scan.changed))
        kind = "python" if python else kind_of(file.path.name)
        ratio = _UNZIPPED if kind == "zipped" else 1
        parts: list[Unit] = [FilePart(file, records, kind, *cut[:3], size=ratio * cut.size) for cut in scan.stretches]
        if scan.problem:
            parts = [Broken(Bad(file.name, "cannot be read", scan.problem))]
        elif not scan.stretches[0].first:
            if room <= 0:
                groups.append([])
                room = unit_bytes
            groups[-1] += parts
            room -= scan.size
            continue
        groups += [[part] for part in parts]
        room = 0
    return [
        group[0] if len(group) == 1 else Together(tuple(group), sum(part.size for part in group)) for group in groups
    ]


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _scan(file: SourceFile, now: os.stat_result | None, unit_bytes: int, progress: Callable[[int], None]) -> Scan:
    kind = kind_of(file.path.name)
    size, changed = (0, 0) if now is None else (now.st_size, now.st_mtime_ns)
    try:
        # Opened here: pyarrow takes no file name that is not UTF-8.
        with file.path.open("rb") as opened:
            limits = {"lines": unit_bytes, "text": documents.LONGEST}
            sha256, cuts = _read(opened, limits.get(kind), progress)
            if kind == "text":
                cuts = _text_cuts(opened, cuts, documents.LONGEST)
            elif kind == "parquet":
                cuts = _parquet_stretches(opened, unit_bytes)
    except OSError as error:
        return Scan(size, changed, "", problem=error.strerror or str(error))
    return Scan(size, changed, sha256, tuple(cuts))


def _read(file: IO[bytes], limit: int | None, progress: Callable[[int], None]) -> tuple[str, list[Stretch]]:
    """SHA-256 (hex) of a file, and its pieces: each ends with the first line end at ``limit`` bytes or more; None:
    the file is one piece."""
    digest = hashlib.sha256()
    cuts: list[Stretch] = []
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
            cuts.append(Stretch(begin, place + done, first, place + done - begin))
            begin, first = place + done, line
        line += block.count(b"\n", done) if limit is not None else 0
        place += len(block)
        progress(len(block))
    if place > begin or not cuts:
        cuts.append(Stretch(begin, place, first, place - begin))
    return digest.hexdigest(), cuts


def _text_cuts(file: IO[bytes], lines: list[Stretch], limit: int) -> list[Stretch]:
    """Pieces of a text that become one document each: whole ``lines`` of about ``limit`` bytes. Where these are longer
    than twice that, for lack of a line end, they are cut between two characters."""
    edges = [0]
    for begin, _, _, size in lines:
        for place in range(begin + limit, begin + size - limit, limit):
            file.seek(place)
            edges.append(place + next((at for at, byte in enumerate(file.read(4)) if byte & 0xC0 != 0x80), 0))
        edges.append(begin + size)
    if len(edges) == 2:
        return [Stretch(0, edges[1], 0, edges[1])]
    return [Stretch(begin, end, number, end - begin) for number, (begin, end) in enumerate(pairwise(edges), 1)]


def row_groups(file: IO[bytes]) -> list[tuple[int, int]]:
    """Rows and bytes of each row group of a Parquet file. Raises what pyarrow raises, see ``parquet_problem``."""
    from pyarrow import parquet

    with parquet.ParquetFile(file) as table:
        groups = [table.metadata.row_group(number) for number in range(table.metadata.num_row_groups)]
        return [(group.num_rows, group.total_byte_size) for group in groups]


def _parquet_stretches(file: IO[bytes], unit_bytes: int) -> list[Stretch]:
    """Consecutive row groups of about ``unit_bytes`` together; all of a file that is not Parquet, which its reader
    says."""
    try:
        groups = row_groups(file)
    except Exception as error:
        if parquet_problem(error) is None:
            raise
        return [Stretch(0, None, 1, 0)]
    stretches: list[Stretch] = []
    begin = end = size = 0
    for number, (rows, group_bytes) in enumerate(groups, 1):
        size, end = size + group_bytes, end + rows
        if size >= unit_bytes or number == len(groups):
            stretches.append(Stretch(begin, end, begin + 1, size))
            begin, size = end, 0
    return stretches or [Stretch(0, 0, 1, 0)]
