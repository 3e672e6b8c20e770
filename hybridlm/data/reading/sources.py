"""Where documents come from, by ``data.source``. A kind of source is a module with a function that opens a corpus, and
a line in ``SOURCES``; sources without documents (token files, generated tasks) are in ``preparing.prepare``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hybridlm.config.data import CorpusConfig
from hybridlm.data.reading.documents import Corpus
from hybridlm.data.reading.hub import open_hub
from hybridlm.data.reading.standard_library import open_standard_library
from hybridlm.data.reading.user_files import open_files

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
