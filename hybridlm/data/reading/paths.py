"""The files that ``data.path`` and ``data.val_path`` name: a file, a folder, a glob, or a list of these.

An existing path is used literally before it is treated as a glob, so brackets and braces in a name need no quoting.
Every real file is read once, under its shortest name, however many links and patterns lead to it.
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from hybridlm.data.reading.readers import KINDS
from hybridlm.errors import ConfigError, printable

RECORD_ENDINGS = tuple(KINDS)
_PROSE = ".txt .text .md .markdown .rst .org .adoc .asciidoc .tex .html .htm .vtt .srt"
_CODE = (
    ".py .pyi .pyx .c .h .cc .cpp .cxx .hh .hpp .cu .cuh .rs .go .java .kt .scala .js .jsx .ts .tsx .rb .php .pl .lua"
    " .r .jl .swift .m .hs .ml .lisp .el .clj .ex .erl .sh .bash .ps1 .sql .css .cmake .zig .nim .dart .f90 .asm"
)
# What is read of a folder. A glob takes whatever it matches.
TEXT_ENDINGS = tuple(f"{_PROSE} {_CODE}".split())
_MOST_PATTERNS = 1000
_SNIFFED = 8192  # bytes
_SHOWN = 6  # reasons
_BRACES = re.compile(r"\{([^{}]*,[^{}]*)\}")


@dataclass(frozen=True)
class Found:
    """The files of one field. field, patterns: the field and its value. files: path by name below their common folder,
    sorted by name; left_out: number of files by reason."""

    field: str
    patterns: str | Sequence[str]
    files: dict[str, Path]
    left_out: Counter[str]

    @property
    def shown(self) -> str:
        """The patterns as given."""
        return shown(self.patterns)

    @property
    def place(self) -> str:
        """The patterns as absolute paths."""
        patterns = [self.patterns] if isinstance(self.patterns, str) else self.patterns
        return "\0".join(os.path.abspath(os.path.expanduser(pattern)) for pattern in patterns)

    def without(self, others: Found) -> Found:
        """Without the files that are also in ``others``. ConfigError: none is left."""
        taken = {os.path.realpath(path) for path in others.files.values()}
        left = {name: path for name, path in self.files.items() if os.path.realpath(path) not in taken}
        if not left:
            raise ConfigError(f"{others.field}: names all files of {self.field}; none is left to train on")
        count = len(self.files) - len(left)
        return replace(
            self, files=left, left_out=self.left_out + Counter({f"files of {others.field}": count} if count else {})
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """A line about what is left out, if anything is."""
        line = f"{self.field}: reading {len(self.files):,} file(s); left out: {_counted(self.left_out)}"
        return (line,) if self.left_out else ()


def shown(patterns: str | Sequence[str]) -> str:
    """One or several patterns in one line."""
    return printable(patterns if isinstance(patterns, str) else f"[{','.join(patterns)}]")


def find_files(
    field: str, patterns: str | Sequence[str], endings: Sequence[str] = (*RECORD_ENDINGS, *TEXT_ENDINGS)
) -> Found:
    """The files of ``patterns``. field: its name for messages; endings: of the files that are read in a folder.

    ConfigError: a pattern matches no file.
    """
    left_out: Counter[str] = Counter()
    paths: list[str] = []
    roots: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        expanded = os.path.expanduser(pattern)
        if os.path.isdir(expanded):
            mine, root = list(_of_folder(expanded, endings, left_out)), expanded
        elif os.path.exists(expanded):
            mine, root = [expanded], os.path.dirname(expanded)
        else:
            mine, root = _of_glob(field, expanded)
        if mine == [expanded] and not os.path.isfile(expanded):
            raise ConfigError(
                f"{field}={printable(pattern)} is neither a file nor a folder but a pipe, a socket or a device"
            )
        mine = [path for path in mine if os.path.isfile(path)]
        if not mine:
            detail = f"; left out: {_counted(left_out)}" if left_out and os.path.isdir(expanded) else ""
            raise ConfigError(f"{field}={printable(pattern)} matches no file (relative to {Path.cwd()}){detail}")
        paths += mine
        roots.append(root)
    return Found(
        field, patterns, _once(paths, os.path.commonpath([os.path.abspath(root) for root in roots]), left_out), left_out
    )


def _counted(left_out: Counter[str]) -> str:
    """The most common reasons."""
    most = [f"{count:,} {reason}" for reason, count in left_out.most_common(_SHOWN)]
    return ", ".join([*most, "..."] if len(left_out) > _SHOWN else most)


def _once(paths: Sequence[str], root: str, left_out: Counter[str]) -> dict[str, Path]:
    """Every real file under one name."""
    named = {os.path.relpath(path, root).replace(os.sep, "/"): Path(path) for path in paths}
    seen: set[tuple[int, int]] = set()
    chosen: dict[str, Path] = {}
    for name in sorted(named, key=lambda name: (name.count("/"), name)):
        stat = named[name].stat()
        if (stat.st_dev, stat.st_ino) in seen:
            left_out["links to files that are read already"] += 1
        else:
            seen.add((stat.st_dev, stat.st_ino))
            chosen[name] = named[name]
    return dict(sorted(chosen.items()))


def _of_folder(top: str, endings: Sequence[str], left_out: Counter[str]) -> Iterator[str]:
    for folder in _folders(top, left_out):
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir():
                    continue
                if not entry.is_file():
                    left_out["pipes, devices and dead links"] += 1
                elif entry.name.startswith("."):
                    left_out["hidden"] += 1
                elif not entry.name.lower().endswith(tuple(endings)):
                    left_out[_ending(entry.name)] += 1
                elif entry.name.lower().endswith(TEXT_ENDINGS) and _binary(entry.path):
                    left_out["binary"] += 1
                else:
                    yield entry.path


def _ending(name: str) -> str:
    ending = os.path.splitext(name)[1].lower()
    return f"{printable(ending)[:20]} files" if ending else "files without an ending"


def _binary(path: str) -> bool:
    """Whether a file does not begin like text, which has no zero bytes. Unreadable files are reported elsewhere."""
    try:
        with open(path, "rb") as file:
            return b"\0" in file.read(_SNIFFED)
    except OSError:
        return False


def _folders(top: str, left_out: Counter[str]) -> Iterator[str]:
    """``top`` and every folder below it once, breadth first, following links; hidden ones are skipped."""
    waiting, seen = [top], set[tuple[int, int]]()
    for folder in waiting:  # grows as it is read
        try:
            stat = os.stat(folder)
            if (stat.st_dev, stat.st_ino) in seen:
                continue
            seen.add((stat.st_dev, stat.st_ino))
            with os.scandir(folder) as entries:
                below = sorted(entry.name for entry in entries if entry.is_dir())
        except OSError:
            left_out["folders that cannot be read"] += 1
            continue
        yield folder
        for name in below:
            if not name.startswith("."):
                waiting.append(os.path.join(folder, name))
            else:
                left_out["hidden folders"] += 1


def _of_glob(field: str, pattern: str) -> tuple[list[str], str]:
    """What a pattern matches, and the folder above its first part with a wildcard."""
    parts = Path(pattern).parts
    fixed = 0
    # Parts that exist literally are not patterns.
    while fixed < len(parts) - 1 and (
        os.path.isdir(os.path.join(*parts[: fixed + 1])) or not _is_pattern(parts[fixed])
    ):
        fixed += 1
    root = str(Path(*parts[:fixed]))
    rest = os.path.join(*parts[fixed:], *([""] if pattern.endswith(os.sep) else [])) if parts else ""
    patterns = list(islice(_braces(rest), _MOST_PATTERNS + 1))
    if len(patterns) > _MOST_PATTERNS:
        raise ConfigError(
            f"{field}={printable(pattern)[:200]}: its braces expand to more than {_MOST_PATTERNS} patterns"
        )
    return [path for one in patterns for path in _globbed(root, one)], root


def _is_pattern(part: str) -> bool:
    return glob.has_magic(part) or _BRACES.search(part) is not None


def _braces(pattern: str) -> Iterator[str]:
    """``a.{md,rst}`` as a.md and a.rst."""
    if match := _BRACES.search(pattern):
        for choice in match[1].split(","):
            yield from _braces(pattern.replace(match[0], choice, 1))
    else:
        yield pattern


def _globbed(folder: str, pattern: str) -> list[str]:
    """``glob.glob`` below a folder, except that ``**`` visits every real folder once instead of following circular
    links."""
    parts = Path(pattern).parts
    if "**" not in parts:
        return [os.path.join(folder, name) for name in glob.glob(pattern, root_dir=folder)]
    at = parts.index("**")
    before, behind = parts[:at], (*parts[at + 1 :], "") if pattern.endswith(os.sep) else parts[at + 1 :] or ("*",)
    tops = _globbed(folder, os.path.join(*before)) if before else [folder]
    return [
        path
        for top in tops
        if os.path.isdir(top)
        for below in _folders(top, Counter())
        for path in _globbed(below, os.path.join(*behind))
    ]
