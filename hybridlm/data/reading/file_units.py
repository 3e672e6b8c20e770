"""The units of a corpus in files: small files together, large ones in pieces.

The corpus fingerprint covers the content of the files, so a file that is gone or has changed since it was scanned is a
UserError, not a missing document.
"""

from __future__ import annotations

import contextlib
import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from hybridlm.data.reading.documents import Bad, Document, Records, Unit
from hybridlm.data.reading.readers import read_lines, read_parquet, text_document
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
class FilePart:
    """A file, or a part of it: bytes [begin, end) of a text or of JSON lines, rows [begin, end) of Parquet; end None:
    to the end. kind: see ``kind_of``, or "python": a module of the standard library. size: bytes of text, maybe
    estimated.

    number: of the first line; of a piece of a text that is too long for one document (they are named name#1, name#2,
    ...), 0: it is whole.
    """

    file: Readable
    records: Records
    kind: str
    begin: int = 0
    end: int | None = None
    number: int = 1
    size: int = 0

    def documents(self) -> Iterator[Document | Bad]:
        name, length = self.file.name, None if self.end is None else self.end - self.begin
        with self.file.opened() as file:
            if self.kind == "parquet":
                yield from read_parquet(name, file, self.records, self.begin, self.end)
            elif self.kind == "zipped":
                with gzip.open(file) as unzipped:
                    yield from read_lines(name, unzipped, self.records)
            elif self.kind == "lines":
                if self.begin:
                    file.seek(self.begin)
                yield from read_lines(name, file, self.records, self.number, length)
            else:
                file.seek(self.begin)
                # By its name, a Python release that changes a module does not move it between training and validation.
                key = name if self.kind == "python" else ""
                yield text_document(f"{name}#{self.number}" if self.number else name, file.read(length or -1), key)


@dataclass(frozen=True)
class Together:
    """Units read one after the other, up to the document with which ``share`` bytes of text are reached; None: to the
    end. problem: why they cannot be read now, which is a UserError: what was prepared from them before may suffice."""

    units: tuple[Unit, ...]
    size: int
    share: int | None = None
    problem: UserError | None = None

    def documents(self) -> Iterator[Document | Bad]:
        if self.problem is not None:
            raise self.problem
        taken = 0
        for one in (one for unit in self.units for one in unit.documents()):
            yield one
            if self.share is not None and isinstance(one, Document):
                taken += sum(len(text.encode()) for text in one.texts)
                if taken >= self.share:
                    return


@dataclass(frozen=True)
class Broken:
    """A file of which nothing can be read."""

    bad: Bad
    size: int = 0

    def documents(self) -> Iterator[Document | Bad]:
        yield self.bad
