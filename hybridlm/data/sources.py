"""Where text comes from, and which documents are held out for validation."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from hybridlm.config.data import DataConfig
from hybridlm.config.section import ConfigError
from hybridlm.data.readers import Bad, Document, read

log = logging.getLogger(__name__)

# Not library code in the sense of text worth learning: installed packages, tests, tables and generated or deliberately broken files.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "idlelib", "lib2to3", "encodings", "pydoc_data", "__pycache__"}
_SKIPPED_PREFIXES = ("test", "config-")


def documents(config: DataConfig) -> Iterable[Document]:
    """The corpus' documents that hold text, in order of name, then of line or row.

    ConfigError: no file, nothing readable, or with ``data.on_bad=fail`` the first thing that is not.
    """
    if config.source == "files":
        if config.path is None:
            raise ConfigError("data.source=files needs data.path: a glob of files, for instance data.path='corpus/**/*.txt'")
        return _files(config.path, config)
    if config.path is not None:
        raise ConfigError(f"data.path={config.path} is not read by data.source={config.source}: set data.source=files too")
    return _stdlib(Path(sysconfig.get_path("stdlib")))


def is_validation(key: str, fraction: float) -> bool:
    """Whether a document is held out: the hash of its key in [0, 1) lies below ``fraction``, so no other has a say."""
    return _position(key) < fraction


def split(corpus: Sequence[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """(training, validation) documents. ConfigError: one of the two would be empty."""
    train = [document for document in corpus if not is_validation(document.key, fraction)]
    val = [document for document in corpus if is_validation(document.key, fraction)]
    if train and val:
        return train, val
    if len(corpus) < 2:
        raise ConfigError(
            f"the corpus has {len(corpus)} document(s) with text, 2 or more are needed to hold one out: cut it into more files"
        )
    places = sorted(_position(document.key) for document in corpus)
    lowest, highest = places[0], places[-1]
    side = "none of" if not val else "all"
    raise ConfigError(
        f"data.val_fraction={fraction} holds out {side} the {len(corpus)} documents (the choice is by a hash of their names): "
        f"legal is a value above {lowest:.6f} and up to {highest:.6f}"
    )


def _position(name: str) -> float:
    # 53 bits, so that the quotient is exact in a double and never rounds up to 1.
    return (int.from_bytes(hashlib.sha256(name.encode("utf-8", errors="surrogateescape")).digest()[:8], "big") >> 11) / 2**53


def _stdlib(root: Path) -> Iterator[Document]:
    """The ``*.py`` files of a standard library, decoded as Python itself does (PEP 263, universal newlines)."""
    paths = sorted(_python_files(root), key=lambda path: path.relative_to(root).as_posix())
    if not paths:
        raise ConfigError(f"data.source=stdlib: no *.py file in {root} (this interpreter comes without its sources); use data.source=files")
    undecodable: list[str] = []
    for path in paths:
        name = path.relative_to(root).as_posix()
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):  # SyntaxError: an unknown or contradictory coding line
            undecodable.append(name)
            continue
        if text:
            yield Document(name, text)
    if undecodable:
        log.warning("data.source=stdlib: %d file(s) skipped that cannot be decoded: %s", len(undecodable), ", ".join(undecodable))


def _python_files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith(_SKIPPED_PREFIXES)]
        yield from (Path(folder, name) for name in files if name.endswith(".py"))


def _files(pattern: str, config: DataConfig) -> Iterator[Document]:
    found = _matches(pattern)
    bad: list[Bad] = []
    good = 0
    for name, path in found:
        for document in read(name, path, config.text_field):
            if isinstance(document, Document):
                good += 1
                yield document
            elif config.on_bad == "fail":
                raise ConfigError(f"data.path: {document}; mend it, or leave such documents out with data.on_bad=skip")
            else:
                bad.append(document)
    if bad and not good:
        raise ConfigError(f"data.path={pattern}: none of its {len(bad)} document(s) can be used; the first: {bad[0]}")
    if bad:
        log.warning("data.on_bad=skip: %d of %d documents left out: %s", len(bad), good + len(bad), _summary(bad))


def _summary(bad: Sequence[Bad]) -> str:
    """How often each kind of mistake was met, the most frequent first, and where first."""
    kinds: dict[str, list[Bad]] = {}
    for one in bad:
        kinds.setdefault(one.what, []).append(one)
    ordered = sorted(kinds.values(), key=len, reverse=True)
    return "; ".join(
        f"{len(ones)} x {ones[0].what} (first {ones[0].where}{f', {ones[0].detail}' if ones[0].detail else ''})" for ones in ordered
    )


def _matches(pattern: str) -> list[tuple[str, Path]]:
    """The files of a glob by their names below its root, in order of name."""
    expanded = os.path.expanduser(pattern)
    if os.path.isdir(expanded):
        raise ConfigError(f"data.path={pattern} is a folder: legal is a glob of files, for instance '{Path(pattern).as_posix()}/**/*.txt'")
    paths = [Path(path) for path in glob.glob(expanded, recursive=True) if os.path.isfile(path)]
    if not paths:
        raise ConfigError(f"data.path={pattern} matches no file (seen from {Path.cwd()})")
    root = _glob_root(expanded)
    return sorted({path.relative_to(root).as_posix(): path for path in paths}.items())


def _glob_root(pattern: str) -> Path:
    """The folder above the first part with a wildcard: names below it stay the same wherever the corpus lies."""
    parts = Path(pattern).parts
    fixed = next((place for place, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return Path(*parts[:fixed])
