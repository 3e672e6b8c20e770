"""Where documents come from: the files, data sets and libraries that a configuration names, as a corpus in units."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from hybridlm.config.data import CorpusConfig
from hybridlm.data.reading.conversations import ChatRecords
from hybridlm.data.reading.documents import Records, TextRecords
from hybridlm.data.reading.file_units import SourceFile
from hybridlm.data.reading.hub import open_hub
from hybridlm.data.reading.paths import RECORD_ENDINGS, Found, find_files, shown
from hybridlm.data.reading.readers import kind_of
from hybridlm.data.reading.scan import scan_files
from hybridlm.data.reading.units import Corpus
from hybridlm.errors import ConfigError, printable

# Not library code in the sense of text worth learning: installed packages, tests, tables and generated or deliberately
# broken files.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "idlelib", "lib2to3", "encodings", "pydoc_data", "__pycache__"}
_SKIPPED_PREFIXES = ("test", "config-")
_LEAST, _ENOUGH = 8_000_000, 64  # bytes of a unit, units of a corpus


def open_corpus(
    config: CorpusConfig, *, unit_bytes: int, cache: Path, progress: Callable[[int], None] = lambda n: None
) -> Corpus:
    """The corpus in units of about ``unit_bytes`` of text, unread but for what has changed since it was opened last.

    cache: a folder for what is found of its files; progress gets numbers of bytes that were looked at.
    ConfigError: there is no file, or the data set cannot be had.
    """
    if config.source != "files" and config.path is not None:
        raise ConfigError(
            f"data.path={shown(config.path)} is not read by data.source={config.source}: set data.source=files too"
        )
    if config.source == "hf":
        return open_hub(config.hf, _records(config), unit_bytes)
    if config.source == "stdlib":
        place = sysconfig.get_path("stdlib")
        return _scanned(config, _stdlib(Path(place)), place, unit_bytes, cache, progress)
    if config.path is None:
        raise ConfigError(
            "data.source=files needs data.path: a file, a folder or a glob, for instance data.path='corpus/**/*.txt'"
        )
    train = _found(config, "data.path", config.path)
    if config.val_path is None:
        corpus = _scanned(config, _files(train), train.place, unit_bytes, cache, progress)
        one_text = len(train.files) == 1 and kind_of(next(iter(train.files.values()))) == "text"
        return replace(corpus, one_text=one_text, notes=_notes(train))
    val = _found(config, "data.val_path", config.val_path)
    train = train.without(val)
    # Validation first: of equal texts the first is kept (data.dedup), and that is not to be one of training.
    both = [
        _scanned(config, _files(one), f"{one.place}\0{one.field}", unit_bytes, cache, progress) for one in (val, train)
    ]
    return Corpus(
        [unit for corpus in both for unit in corpus.units],
        hashlib.sha256("/".join(corpus.fingerprint for corpus in both).encode()).hexdigest(),
        named=len(both[0].units),
        notes=_notes(train, val),
    )


def _scanned(
    config: CorpusConfig,
    files: Sequence[SourceFile],
    place: str,
    unit_bytes: int,
    cache: Path,
    progress: Callable[[int], None],
) -> Corpus:
    """place: which files they are, for what is kept of them."""
    unit_bytes = min(unit_bytes, _even(files))
    kept = hashlib.sha256(f"{place}\0{unit_bytes}".encode("utf-8", "surrogateescape")).hexdigest()[:16]
    python = config.source == "stdlib"
    return scan_files(files, _records(config), unit_bytes, cache / "scans" / f"{kept}.json", progress, python=python)


def _found(config: CorpusConfig, field: str, paths: str | tuple[str, ...]) -> Found:
    if config.format == "text":
        return find_files(field, paths)
    found = find_files(field, paths, RECORD_ENDINGS)
    if unfit := [name for name, path in found.files.items() if kind_of(path) == "text"]:
        raise ConfigError(
            f"{field}={shown(paths)}: {printable(unfit[0])} holds no records; data.format=chat reads .jsonl, .jsonl.gz"
            " and .parquet"
        )
    return found


def _files(found: Found) -> list[SourceFile]:
    return [SourceFile(name, path) for name, path in found.files.items()]


def _notes(*found: Found) -> tuple[str, ...]:
    return tuple(note for one in found if (note := one.note()) is not None)


def _even(files: Sequence[SourceFile]) -> int:
    """Bytes of a unit that make some dozens of the corpus, so that many processes end at about the same time; the same
    while the corpus does not double, so that not all of it is cut anew whenever it grows."""
    total, unit = 0, _LEAST
    for file in files:
        with contextlib.suppress(OSError):
            total += file.path.stat().st_size
    while unit * _ENOUGH < total:
        unit *= 2
    return unit


def _records(config: CorpusConfig) -> Records:
    return ChatRecords() if config.format == "chat" else TextRecords(config.text_field)


def _stdlib(root: Path) -> list[SourceFile]:
    """The ``*.py`` files of a standard library."""
    files = [SourceFile(path.relative_to(root).as_posix(), path) for path in _python_files(root)]
    if not files:
        raise ConfigError(
            f"data.source=stdlib: no *.py file in {root} (this interpreter comes without its sources); use"
            " data.source=files"
        )
    return sorted(files, key=lambda file: file.name)


def _python_files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = [
            name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith(_SKIPPED_PREFIXES)
        ]
        yield from (Path(folder, name) for name in files if name.endswith(".py"))
