"""Where documents come from, by ``data.source``. A kind of source is a function that opens a corpus, and a line in
``SOURCES``; sources without documents (token files, generated tasks) are in ``preparing.prepare``."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from hybridlm.config.data import CorpusConfig
from hybridlm.data.reading.documents import Corpus
from hybridlm.data.reading.file_units import SourceFile
from hybridlm.data.reading.hub import open_hub
from hybridlm.data.reading.paths import RECORD_ENDINGS, Found, find_files, shown
from hybridlm.data.reading.readers import kind_of
from hybridlm.data.reading.scan import open_scanned
from hybridlm.errors import ConfigError, printable

# Not library code worth learning: installed packages, tests, tables, and generated or deliberately broken files.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "idlelib", "lib2to3", "encodings", "pydoc_data", "__pycache__"}
_SKIPPED_PREFIXES = ("test", "config-")


def open_standard_library(
    config: CorpusConfig, unit_bytes: int, cache: Path, progress: Callable[[int], None]
) -> Corpus:
    """``data.source=stdlib``: the Python files of the interpreter's own library.

    ConfigError: this interpreter comes without sources."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        (SourceFile(path.relative_to(root).as_posix(), path) for path in _python_files(root)),
        key=lambda file: file.name,
    )
    if not files:
        raise ConfigError(
            f"data.source=stdlib: no *.py file in {root} (this interpreter comes without its sources); use"
            " data.source=files"
        )
    return open_scanned(config, files, str(root), unit_bytes, cache, progress)


def _python_files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = [
            name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith(_SKIPPED_PREFIXES)
        ]
        yield from (Path(folder, name) for name in files if name.endswith(".py"))


def open_files(config: CorpusConfig, unit_bytes: int, cache: Path, progress: Callable[[int], None]) -> Corpus:
    """``data.source=files``: the user's own files.

    ConfigError: a path matches no file, or one without conversations where these are required."""

    def scanned(found: Found, place: str) -> Corpus:
        files = [SourceFile(name, path) for name, path in found.files.items()]
        return open_scanned(config, files, place, unit_bytes, cache, progress)

    assert config.path is not None  # config.data_constraints
    train = _found(config, "data.path", config.path)
    if config.val_path is None:
        one_text = [kind_of(path.name) for path in train.files.values()] == ["text"]
        return replace(scanned(train, train.place), one_text=one_text, notes=train.notes)
    val = _found(config, "data.val_path", config.val_path)
    train = train.without(val)
    # Validation first: of equal texts the first is kept (data.dedup), and it must not be the training one.
    both = [scanned(found, f"{found.place}\0{found.field}") for found in (val, train)]
    return Corpus(
        [unit for corpus in both for unit in corpus.units],
        hashlib.sha256("/".join(corpus.fingerprint for corpus in both).encode()).hexdigest(),
        named=len(both[0].units),
        notes=train.notes + val.notes,
    )


def _found(config: CorpusConfig, field: str, paths: str | tuple[str, ...]) -> Found:
    if config.format == "text":
        return find_files(field, paths)
    found = find_files(field, paths, RECORD_ENDINGS)
    if unfit := [name for name, path in found.files.items() if kind_of(path.name) == "text"]:
        raise ConfigError(
            f"{field}={shown(paths)}: {printable(unfit[0])} holds no records; data.format={config.format} reads .jsonl,"
            " .jsonl.gz and .parquet"
        )
    return found


SOURCES: dict[str, Callable[[CorpusConfig, int, Path, Callable[[int], None]], Corpus]] = {
    "stdlib": open_standard_library,
    "files": open_files,
    "hf": open_hub,
}


def open_corpus(
    config: CorpusConfig, *, unit_bytes: int, cache: Path, progress: Callable[[int], None] = lambda n: None
) -> Corpus:
    """The corpus in units of about ``unit_bytes`` of text; only what has changed since it was last opened is read.

    cache: a folder for what is found in its files; progress gets numbers of bytes that were scanned.
    UserError: there is no file, or the data set cannot be had.
    """
    return SOURCES[config.source](config, unit_bytes, cache, progress)
