"""Where documents come from, and which of them are held out for validation."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hybridlm.config.data import CorpusConfig
from hybridlm.data.chat import ChatRecords
from hybridlm.data.reading.documents import Records, TextRecords
from hybridlm.data.reading.file_units import SourceFile
from hybridlm.data.reading.hub import open_hub
from hybridlm.data.reading.readers import kind_of
from hybridlm.data.reading.scan import scan_files
from hybridlm.data.reading.units import Corpus
from hybridlm.errors import ConfigError

# Not library code in the sense of text worth learning: installed packages, tests, tables and generated or deliberately broken files.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "idlelib", "lib2to3", "encodings", "pydoc_data", "__pycache__"}
_SKIPPED_PREFIXES = ("test", "config-")
_LEAST, _ENOUGH = 8_000_000, 64  # bytes of a unit, units of a corpus


def open_corpus(config: CorpusConfig, *, unit_bytes: int, cache: Path, progress: Callable[[int], None] = lambda n: None) -> Corpus:
    """The corpus in units of about ``unit_bytes`` of text, unread but for what has changed since it was opened last.

    cache: a folder for what is found of its files; progress gets numbers of bytes that were looked at.
    ConfigError: there is no file, or the data set cannot be had.
    """
    if config.source == "files":
        if config.path is None:
            raise ConfigError("data.source=files needs data.path: a glob of files, for instance data.path='corpus/**/*.txt'")
        files, place = _matches(config.path), os.path.abspath(os.path.expanduser(config.path))
        unfit = [file.name for file in files if kind_of(file.path) == "text"]
        if config.format == "chat" and unfit:
            raise ConfigError(
                f"data.path={config.path}: {unfit[0]} holds no records; data.format=chat reads .jsonl, .jsonl.gz and .parquet"
            )
    elif config.path is not None:
        raise ConfigError(f"data.path={config.path} is not read by data.source={config.source}: set data.source=files too")
    elif config.source == "hf":
        return open_hub(config.hf, _records(config), unit_bytes)
    else:
        place = sysconfig.get_path("stdlib")
        files = _stdlib(Path(place))
    unit_bytes = min(unit_bytes, _even(files))
    kept = hashlib.sha256(f"{place}\0{unit_bytes}".encode("utf-8", "surrogateescape")).hexdigest()[:16]
    python = config.source == "stdlib"
    return scan_files(files, _records(config), unit_bytes, cache / "scans" / f"{kept}.json", progress, python=python)


def _even(files: Sequence[SourceFile]) -> int:
    """Bytes of a unit that make some dozens of the corpus, so that many processes end at about the same time; the same while the corpus
    does not double, so that not all of it is cut anew whenever it grows."""
    total, unit = 0, _LEAST
    for file in files:
        with contextlib.suppress(OSError):
            total += file.path.stat().st_size
    while unit * _ENOUGH < total:
        unit *= 2
    return unit


def position(key: str) -> float:
    """The place in [0, 1) of a document, by a hash of its key: below ``data.val_fraction`` it is held out, and no other has a say."""
    # 53 bits, so that the quotient is exact in a double and never rounds up to 1.
    return (int.from_bytes(hashlib.sha256(key.encode("utf-8", errors="surrogateescape")).digest()[:8], "big") >> 11) / 2**53


def _records(config: CorpusConfig) -> Records:
    return ChatRecords() if config.format == "chat" else TextRecords(config.text_field)


def _stdlib(root: Path) -> list[SourceFile]:
    """The ``*.py`` files of a standard library."""
    files = [SourceFile(path.relative_to(root).as_posix(), path) for path in _python_files(root)]
    if not files:
        raise ConfigError(f"data.source=stdlib: no *.py file in {root} (this interpreter comes without its sources); use data.source=files")
    return sorted(files, key=lambda file: file.name)


def _python_files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith(_SKIPPED_PREFIXES)]
        yield from (Path(folder, name) for name in files if name.endswith(".py"))


def _matches(pattern: str) -> list[SourceFile]:
    """The files of a glob by their names below its root, in order of name."""
    expanded = os.path.expanduser(pattern)
    if os.path.isdir(expanded):
        raise ConfigError(f"data.path={pattern} is a folder: legal is a glob of files, for instance '{Path(pattern).as_posix()}/**/*.txt'")
    paths = [Path(path) for path in glob.glob(expanded, recursive=True) if os.path.isfile(path)]
    if not paths:
        raise ConfigError(f"data.path={pattern} matches no file (seen from {Path.cwd()})")
    root = _glob_root(expanded)
    return [SourceFile(name, path) for name, path in sorted({path.relative_to(root).as_posix(): path for path in paths}.items())]


def _glob_root(pattern: str) -> Path:
    """The folder above the first part with a wildcard: names below it stay the same wherever the corpus lies."""
    parts = Path(pattern).parts
    fixed = next((place for place, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return Path(*parts[:fixed])
