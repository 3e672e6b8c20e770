"""Documents out of files: plain text, Python sources, lines of JSON, Parquet; and what is wrong with what cannot be
one.

A file is read as a stream, so memory is bounded by its longest document. What is wrong with its content is a ``Bad``; a
file that the system does not give us is the OSError that it is.
"""

from __future__ import annotations

import gzip
import json
import tokenize
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from hybridlm.data.reading import documents
from hybridlm.data.reading.documents import TOO_LONG, Bad, Document, Records, encodable

if TYPE_CHECKING:
    from pyarrow import Array, RecordBatch
    from pyarrow.parquet import ParquetFile

_LINES = (".jsonl", ".ndjson")
_ROWS = 1024  # of a Parquet file at a time, but
_BATCH_BYTES = 4_000_000  # of text at a time, about
_SKIPPED = 1 << 20  # bytes of a line that is too long, at a time
_BUFFER = 1 << 20  # bytes of a Parquet file that are read at a time
NOT_PARQUET = "not readable as Parquet"
_MARK = b"\xef\xbb\xbf"  # a byte order mark is not text


def kind_of(path: Path) -> str:
    """How a file is read, by its ending: lines (.jsonl, .ndjson), zipped (the same as .gz), parquet, else text: one
    document in UTF-8."""
    name = path.name.lower()
    if name.endswith(_LINES):
        return "lines"
    if name.endswith(".parquet"):
        return "parquet"
    return "zipped" if name.endswith(tuple(f"{ending}.gz" for ending in _LINES)) else "text"


def bounded_lines(file: IO[bytes]) -> Iterator[bytes | int]:
    """The lines of a file with their ends; of one that is longer than ``documents.LONGEST`` its size, and no more of it
    is held."""
    while line := file.readline(documents.LONGEST + 1):
        size = len(line)
        if size <= documents.LONGEST:
            yield line
            continue
        while not line.endswith(b"\n") and (line := file.readline(_SKIPPED)):
            size += len(line)
        yield size


def read_lines(name: str, lines: Iterable[bytes | int], records: Records, first: int = 1) -> Iterator[Document | Bad]:
    """The documents of JSON lines as ``bounded_lines`` gives them, empty ones left out. name: the file's path below the
    corpus' root; first: number of the first line."""
    for number, line in enumerate(lines, first):
        if isinstance(line, int):
            yield Bad(f"{name}:{number}", TOO_LONG, f"{line:,} bytes")
        elif line.strip():
            yield _line(f"{name}:{number}", line.rstrip(b"\r\n"), records)


def read_zipped(name: str, path: Path, records: Records) -> Iterator[Document | Bad]:
    """The same of a .gz file; what comes before damage is kept."""
    number = 0

    def counted(lines: Iterable[bytes | int]) -> Iterator[bytes | int]:
        nonlocal number
        for line in lines:
            number += 1
            yield line

    try:
        with gzip.open(path) as file:
            yield from read_lines(name, counted(bounded_lines(file)), records)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield Bad(f"{name}:{number + 1}", "compressed data are damaged", str(error))
    else:
        if not number:
            yield Bad(name, "empty")


def read_text(name: str, path: Path) -> Document | Bad:
    """A file as one document, line ends as they are."""
    return text_document(name, path.read_bytes())


def text_document(name: str, data: bytes) -> Document | Bad:
    """UTF-8 as a document."""
    text = _decoded(name, data)
    if isinstance(text, Bad):
        return text
    return Document(name, text) if text else Bad(name, "empty")


def read_python(name: str, path: Path) -> Document | Bad:
    """A Python source, decoded as Python itself does (PEP 263, universal newlines). Its name is its key: a release of
    Python that changes a module does not move it to the other side."""
    try:
        with tokenize.open(path) as file:
            text = file.read()
    except (SyntaxError, LookupError, UnicodeError) as error:
        # An unknown or contradictory coding line, one that names no coding of texts, or bytes that are not of that
        # coding.
        return Bad(name, "cannot be decoded", str(error).replace(str(path), name))
    if not encodable(text):  # some codings can write half of a surrogate pair
        return Bad(name, "cannot be decoded", "half a surrogate pair")
    return Document(name, text, key=name) if text else Bad(name, "empty")


def read_parquet(name: str, path: Path, records: Records, groups: range, first: int = 1) -> Iterator[Document | Bad]:
    """The documents of row groups of a Parquet file, a row each. first: number of the first row."""
    try:
        # Opened here: pyarrow takes no file name that is not UTF-8.
        with path.open("rb") as opened, _opened(opened, records) as file:
            names = file.schema_arrow.names
            columns = next((wanted for wanted in records.columns if set(wanted) <= set(names)), None)
            if columns is None:
                if groups.start == 0:  # said once for a file
                    wanted = " or ".join(" and ".join(map(repr, wanted)) for wanted in records.columns)
                    yield Bad(name, f"no column {wanted}", f"it has {', '.join(names) or 'none'}")
                return
            row = first
            more = [name for name in records.optional if name in names]
            for batch in _batches(file, [*columns, *more], groups):
                if isinstance(batch, tuple):  # rows, bytes
                    yield Bad(f"{name}:{row}", TOO_LONG, f"{batch[0]:,} rows of {batch[1]:,} bytes together")
                    row += batch[0]
                    continue
                for record in _rows(batch):
                    where = f"{name}:{row}"
                    if isinstance(record, int):
                        yield Bad(where, TOO_LONG, f"{record:,} bytes")
                    else:
                        yield (
                            Bad(where, "cannot be decoded", record)
                            if isinstance(record, str)
                            else records.document(where, record)
                        )
                    row += 1
    except Exception as error:
        problem = parquet_problem(error)
        if problem is None:
            raise
        yield Bad(name, NOT_PARQUET, problem)


def _opened(file: IO[bytes], records: Records) -> ParquetFile:
    """Texts of a dictionary stay in it: thousands of rows can share a long one."""
    from pyarrow import parquet  # slow to import, and few corpora need it

    metadata = parquet.read_metadata(file)
    paths = {metadata.schema.column(place).path for place in range(metadata.num_columns)}
    texts = [name for name in records.texts if name in paths]
    return parquet.ParquetFile(file, metadata=metadata, buffer_size=_BUFFER, read_dictionary=texts)


def parquet_problem(error: Exception) -> str | None:
    """What pyarrow finds wrong with a file's content; None: ``error`` is of another kind."""
    import pyarrow

    # Its own errors, or an OSError without the number that the system's have.
    if isinstance(error, pyarrow.ArrowException) or (isinstance(error, OSError) and error.errno is None):
        return " ".join(str(error).split())
    return None


def unreadable(name: str, error: OSError) -> Bad:
    """A file that the system does not give us."""
    return Bad(name, "cannot be read", error.strerror or str(error))


def _batches(file: ParquetFile, columns: list[str], groups: range) -> Iterator[RecordBatch | tuple[int, int]]:
    """Some rows at a time; of a row group whose rows are too long on the average only their number and bytes."""
    for number in groups:
        group = file.metadata.row_group(number)
        chunks = [group.column(place) for place in range(group.num_columns)]
        size = sum(
            chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.partition(".")[0] in columns
        )
        if size > group.num_rows * documents.LONGEST:
            yield group.num_rows, size
        else:
            rows = max(1, min(_ROWS, _BATCH_BYTES * group.num_rows // max(size, 1)))
            yield from file.iter_batches(batch_size=rows, columns=columns, row_groups=[number])


def _rows(batch: RecordBatch) -> Iterator[dict[str, Any] | str | int]:
    """Its records, or why one has no form in Python: text in Parquet need not be UTF-8, and a date can lie beyond the
    year 9999. Of one that is too long the number of its bytes."""
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    for row in range(batch.num_rows):
        size = sum(_bytes(column, row) for column in columns.values()) if batch.nbytes > documents.LONGEST else 0
        if size > documents.LONGEST:
            yield size
            continue
        try:
            yield {name: column[row].as_py() for name, column in columns.items()}
        except (ValueError, OverflowError) as error:
            yield str(error)


def _bytes(column: Array, row: int) -> int:
    """Of what stands in one row."""
    if hasattr(column, "dictionary"):
        place = column.indices[row].as_py()
        return 0 if place is None else int(column.dictionary.slice(place, 1).nbytes)
    return int(column.slice(row, 1).nbytes)


def _decoded(where: str, data: bytes) -> str | Bad:
    """Bytes, not text mode: line ends stay as they are."""
    try:
        return data.removeprefix(_MARK).decode()
    except UnicodeDecodeError as error:
        return Bad(where, "not UTF-8", f"byte {error.start}: {error.reason}")


def _line(where: str, line: bytes, records: Records) -> Document | Bad:
    decoded = _decoded(where, line)
    if isinstance(decoded, Bad):
        return decoded
    try:
        record = json.loads(decoded)
    except json.JSONDecodeError as error:
        return Bad(where, "not JSON", f"{error.msg}, column {error.colno}")
    except (RecursionError, ValueError) as error:  # ValueError: an integer of more digits than Python converts
        return Bad(where, "not JSON", "nested too deep" if isinstance(error, RecursionError) else str(error))
    if not isinstance(record, dict):
        return Bad(where, "not a JSON object", type(record).__name__)
    return records.document(where, record)
