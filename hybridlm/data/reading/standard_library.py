"""``data.source=stdlib``: the Python files of the interpreter's own library."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from hybridlm.config.data import CorpusConfig
from hybridlm.data.reading.documents import Corpus
from hybridlm.data.reading.file_units import SourceFile
from hybridlm.data.reading.scan import open_scanned
from hybridlm.errors import ConfigError

# Not library code worth learning: installed packages, tests, tables, and generated or deliberately broken files.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "idlelib", "lib2to3", "encodings", "pydoc_data", "__pycache__"}
_SKIPPED_PREFIXES = ("test", "config-")


def open_standard_library(
    config: CorpusConfig, unit_bytes: int, cache: Path, progress: Callable[[int], None]
) -> Corpus:
    """ConfigError: this interpreter comes without sources."""
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
