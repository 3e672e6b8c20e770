"""The units of a corpus in files: small files together, large ones in pieces.

What they hold is in the corpus' fingerprint, so a file that has gone or changed since it was scanned is a ConfigError,
not a document less.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hybridlm.data.reading.documents import Bad, Document, Records
from hybridlm.data.reading.readers import (
    bounded_lines,
    read_lines,
    read_parquet,
    read_python,
    read_text,
    read_zipped,
    text_document,
)
from hybridlm.errors import UserError, printable

_UNZIPPED = 4  # text shrinks to about a quarter


@dataclass(frozen=True)
class SourceFile:
    """A file of the corpus, by its name below the corpus' root. seen: its size and time of change (nanoseconds) when it
    was scanned."""

    name: str
    path: Path
    seen: tuple[int, int] | None = None

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """Around whatever reads the file. ConfigError: it cannot be read, or is not what was scanned."""
        try:
            now = self.path.stat()
            if self.seen is not None and self.seen != (now.st_size, now.st_mtime_ns):
                raise UserError(f"data: {printable(self.name)} changed while the corpus was read; run again")
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(
                f"data: {printable(self.name)} cannot be read any more ({reason}); mend it and run again"
            ) from None


@dataclass(frozen=True)
class Texts:
    """Whole files, a document each. python: they are decoded as Python sources are."""

    files: tuple[SourceFile, ...]
    size: int
    python: bool = False

    def documents(self) -> Iterator[Document | Bad]:
        reader = read_python if self.python else read_text
        for file in self.files:
            with file.unchanged():
                document = reader(file.name, file.path)
            yield document


@dataclass(frozen=True)
class TextSlice:
    """Bytes [begin, end) of a text that is too long for one document; its pieces are called name#1, name#2, ..."""

    file: SourceFile
    begin: int
    end: int
    number: int

    @property
    def size(self) -> int:
        return self.end - self.begin

    def documents(self) -> Iterator[Document | Bad]:
        with self.file.unchanged(), self.file.path.open("rb") as file:
            file.seek(self.begin)
            data = file.read(self.size)
        yield text_document(f"{self.file.name}#{self.number}", data)


@dataclass(frozen=True)
class Lines:
    """Bytes [begin, end) of a file of JSON lines; first: the number of the first one."""

    file: SourceFile
    records: Records
    begin: int
    end: int
    first: int

    @property
    def size(self) -> int:
        return self.end - self.begin

    def documents(self) -> Iterator[Document | Bad]:
        if not self.size:
            yield Bad(self.file.name, "empty")
        with self.file.unchanged(), self.file.path.open("rb") as file:
            file.seek(self.begin)
            yield from read_lines(self.file.name, self._until_end(bounded_lines(file)), self.records, self.first)

    def _until_end(self, lines: Iterator[bytes | int]) -> Iterator[bytes | int]:
        place = self.begin
        while place < self.end and (line := next(lines, b"")):
            place += line if isinstance(line, int) else len(line)
            yield line


@dataclass(frozen=True)
class Zipped:
    """A .gz file of JSON lines, which can only be read from its beginning."""

    file: SourceFile
    records: Records
    compressed: int  # bytes

    @property
    def size(self) -> int:
        return _UNZIPPED * self.compressed

    def documents(self) -> Iterator[Document | Bad]:
        with self.file.unchanged():
            yield from read_zipped(self.file.name, self.file.path, self.records)


@dataclass(frozen=True)
class Rows:
    """Row groups of a Parquet file; first: the number of the first row."""

    file: SourceFile
    records: Records
    groups: tuple[int, int]  # from, to
    first: int
    size: int

    def documents(self) -> Iterator[Document | Bad]:
        if self.groups[0] == self.groups[1]:
            yield Bad(self.file.name, "empty")
            return
        with self.file.unchanged():
            yield from read_parquet(self.file.name, self.file.path, self.records, range(*self.groups), self.first)


@dataclass(frozen=True)
class Broken:
    """A file of which nothing can be read."""

    bad: Bad
    size: int = 0

    def documents(self) -> Iterator[Document | Bad]:
        yield self.bad
