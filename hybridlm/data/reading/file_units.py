"""The units of a corpus in files: small files together, large ones in pieces.

The corpus fingerprint covers the content of the files, so a file that is gone or has changed since it was scanned is a
UserError, not a missing document.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from hybridlm.data.reading.documents import Bad, Document, Records
from hybridlm.data.reading.readers import (
    bounded_lines,
    python_document,
    read_lines,
    read_parquet,
    read_zipped,
    text_document,
)
from hybridlm.errors import UserError, printable


class Readable(Protocol):
    """A file of a corpus, on disk or remote; picklable. name: below the root of the corpus."""

    @property
    def name(self) -> str: ...

    def opened(self) -> contextlib.AbstractContextManager[IO[bytes]]:
        """The file, open for reading. UserError: it cannot be read."""


@dataclass(frozen=True)
class SourceFile:
    """A file on disk. seen: its size and modification time (nanoseconds) when it was scanned."""

    name: str
    path: Path
    seen: tuple[int, int] | None = None

    @contextlib.contextmanager
    def opened(self) -> Iterator[IO[bytes]]:
        """UserError: it cannot be read, or has changed since it was scanned."""
        try:
            now = self.path.stat()
            if self.seen is not None and self.seen != (now.st_size, now.st_mtime_ns):
                raise UserError(f"data: {printable(self.name)} changed while the corpus was being read; run again")
            with self.path.open("rb") as file:
                yield file
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(
                f"data: {printable(self.name)} can no longer be read ({reason}); fix that and run again"
            ) from None


@dataclass(frozen=True)
class Texts:
    """Whole files, one document each. python: decoded as Python sources."""

    files: tuple[SourceFile, ...]
    size: int
    python: bool = False

    def documents(self) -> Iterator[Document | Bad]:
        for source in self.files:
            with source.opened() as file:
                data = file.read()
            yield (python_document if self.python else text_document)(source.name, data)


@dataclass(frozen=True)
class TextSlice:
    """Bytes [begin, end) of a text that is too long for one document; its pieces are named name#1, name#2, ..."""

    file: SourceFile
    begin: int
    end: int
    number: int

    @property
    def size(self) -> int:
        return self.end - self.begin

    def documents(self) -> Iterator[Document | Bad]:
        with self.file.opened() as file:
            file.seek(self.begin)
            data = file.read(self.size)
        yield text_document(f"{self.file.name}#{self.number}", data)


@dataclass(frozen=True)
class Lines:
    """Bytes [begin, end) of a file of JSON lines; first: number of its first line."""

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
        with self.file.opened() as file:
            file.seek(self.begin)
            yield from read_lines(self.file.name, self._until_end(bounded_lines(file)), self.records, self.first)

    def _until_end(self, lines: Iterator[bytes | int]) -> Iterator[bytes | int]:
        place = self.begin
        while place < self.end and (line := next(lines, b"")):
            place += line if isinstance(line, int) else len(line)
            yield line


@dataclass(frozen=True)
class ParquetRows:
    """Rows [begin, end) of a Parquet file. size: bytes of their text."""

    file: SourceFile
    records: Records
    begin: int
    end: int
    size: int

    def documents(self) -> Iterator[Document | Bad]:
        if self.begin == self.end:
            yield Bad(self.file.name, "empty")
            return
        with self.file.opened() as file:
            yield from read_parquet(self.file.name, file, self.records, self.begin, self.end)


@dataclass(frozen=True)
class WholeFile:
    """A file of records of a ``kind`` (see ``kind_of``) that is read from beginning to end: compressed, or remote."""

    file: Readable
    records: Records
    kind: str
    size: int

    def documents(self) -> Iterator[Document | Bad]:
        with self.file.opened() as file:
            if self.kind == "parquet":
                yield from read_parquet(self.file.name, file, self.records)
            elif self.kind == "zipped":
                yield from read_zipped(self.file.name, file, self.records)
            else:
                yield from read_lines(self.file.name, bounded_lines(file), self.records)


@dataclass(frozen=True)
class Broken:
    """A file of which nothing can be read."""

    bad: Bad
    size: int = 0

    def documents(self) -> Iterator[Document | Bad]:
        yield self.bad
