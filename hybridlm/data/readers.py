"""Documents out of files: plain text, lines of JSON, Parquet; and what is wrong with what cannot be one.

A file is read as a stream, so memory is bounded by its longest document.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
_ROWS = 1024  # of a Parquet file at a time
_MARK = b"\xef\xbb\xbf"  # a byte order mark is not text


@dataclass(frozen=True)
class Document:
    """One text. ``name`` is its path below the corpus' root with ``/``, and its line or row where a file holds many.

    text_hash: of one of many in a file. The split into training and validation then hangs on it instead of the name, so that lines in
    front may come and go, and equal texts stay on one side.
    """

    name: str
    text: str
    text_hash: str | None = None

    @property
    def key(self) -> str:
        """What the split hangs on."""
        return self.name if self.text_hash is None else self.text_hash


@dataclass(frozen=True)
class Bad:
    """What cannot be a document. where: file and line or row; what: the kind of mistake; detail: more of it, may be empty."""

    where: str
    what: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}{f' ({self.detail})' if self.detail else ''}"


def read(name: str, path: Path, text_field: str) -> Iterator[Document | Bad]:
    """The documents of one file, by its ending: .jsonl and .ndjson (also .gz), .parquet, anything else is one text in UTF-8.

    name: the file's path below the corpus' root; text_field: the field or column that holds the text.
    """
    lower = path.name.lower()
    try:
        if lower.endswith(_LINES):
            with gzip.open(path) if lower.endswith(".gz") else path.open("rb") as file:
                yield from _lines(name, file, text_field)
        elif lower.endswith(".parquet"):
            yield from _parquet(name, path, text_field)
        else:
            yield _document(name, path.read_bytes())
    except OSError as error:  # gzip's BadGzipFile is one, without a number
        yield Bad(name, "cannot be read", error.strerror or str(error))


def _document(name: str, data: bytes) -> Document | Bad:
    text = _decoded(name, data)
    if isinstance(text, Bad):
        return text
    return Document(name, text) if text else Bad(name, "empty")


def _decoded(where: str, data: bytes) -> str | Bad:
    """Bytes, not text mode: line ends stay as they are."""
    try:
        return data.removeprefix(_MARK).decode()
    except UnicodeDecodeError as error:
        return Bad(where, "not UTF-8", f"byte {error.start}: {error.reason}")


def _lines(name: str, file: IO[bytes], text_field: str) -> Iterator[Document | Bad]:
    number = 0
    try:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _line(f"{name}:{number}", line.rstrip(b"\r\n"), text_field)
    except (EOFError, zlib.error) as error:
        yield Bad(f"{name}:{number + 1}", "compressed data are damaged", str(error))
        return
    if not number:
        yield Bad(name, "empty")


def _line(where: str, line: bytes, text_field: str) -> Document | Bad:
    decoded = _decoded(where, line)
    if isinstance(decoded, Bad):
        return decoded
    try:
        record = json.loads(decoded)
    except (json.JSONDecodeError, RecursionError) as error:
        return Bad(
            where, "not JSON", error.msg + f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deep"
        )
    if not isinstance(record, dict):
        return Bad(where, "not a JSON object", type(record).__name__)
    if text_field not in record:
        return Bad(where, f"no field {text_field!r}", f"it has {', '.join(map(str, record)) or 'none'}")
    return _of_value(where, record[text_field], text_field)


def _of_value(where: str, text: object, text_field: str) -> Document | Bad:
    if not isinstance(text, str):
        return Bad(where, f"{text_field!r} is not text", "null" if text is None else type(text).__name__)
    if not text:
        return Bad(where, "empty")
    try:
        text_hash = hashlib.sha256(text.encode()).hexdigest()
    except UnicodeEncodeError:  # JSON can write half of a surrogate pair
        return Bad(where, f"{text_field!r} is not text", "half a surrogate pair")
    return Document(where, text, text_hash)


def _parquet(name: str, path: Path, text_field: str) -> Iterator[Document | Bad]:
    import pyarrow  # slow to import, and few corpora need it
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if text_field not in file.schema_arrow.names:
                yield Bad(name, f"no column {text_field!r}", f"it has {', '.join(file.schema_arrow.names) or 'none'}")
                return
            row = 0
            for batch in file.iter_batches(batch_size=_ROWS, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    yield _of_value(f"{name}:{row}", text, text_field)
            if not row:
                yield Bad(name, "empty")
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        yield Bad(name, "not readable as Parquet", " ".join(str(error).split()))
