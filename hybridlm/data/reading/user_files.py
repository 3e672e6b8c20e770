"""``data.source=files``: the user's own files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hybridlm.config.data import CorpusConfig
from hybridlm.data.reading.documents import Corpus
from hybridlm.data.reading.file_units import SourceFile
from hybridlm.data.reading.paths import RECORD_ENDINGS, Found, find_files, shown
from hybridlm.data.reading.readers import kind_of
from hybridlm.data.reading.scan import open_scanned
from hybridlm.errors import ConfigError, printable


def open_files(config: CorpusConfig, unit_bytes: int, cache: Path, progress: Callable[[int], None]) -> Corpus:
    """ConfigError: a path matches no file, or one without conversations where these are required."""

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
            f"{field}={shown(paths)}: {printable(unfit[0])} holds no records; data.format=chat reads .jsonl, .jsonl.gz"
            " and .parquet"
        )
    return found
