"""Documents from opened files: plain text, JSON lines, Parquet.

Files are streamed, so memory is bounded by the longest document. Bad content gives a ``Bad``; a file that the operating
system cannot read raises its OSError.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING

from hybridlm.data.reading import documents
from hybridlm.data.reading.documents import TOO_LONG, Bad, Document, Records, columns_of

if TYPE_CHECKING:
    from pyarrow import Array, RecordBatch
    from pyarrow.parquet import ParquetFile

KINDS = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".jsonl.gz": "zipped",
    ".ndjson.gz": "zipped",
    ".parquet": "parquet",
}  # of files with records, by extension
_ROWS = 1024  # of a Parquet file at a time, at most
_BATCH_BYTES = 4_000_000  # of text at a time, about
_SKIPPED = 1 << 20  # bytes of an overlong line at a time
_BUFFER = 1 << 20  # bytes of a Parquet file that are read at a time
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # not text


def kind_of(name: str) -> str:
    """How a file is read, by its extension: lines (of JSON), zipped (the same, compressed), parquet, else text: one
    document in UTF-8."""
    return next((kind for ending, kind in KINDS.items() if name.lower().endswith(ending)), "text")


def bounded_lines(file: IO[bytes] | gzip.GzipFile, length: int | None = None) -> Iterator[bytes | int]:
    """The lines in the next ``length`` bytes of a file (None: all) with their line ends; for a line longer than
    ``documents.LONGEST`` its size, without holding it."""
    taken = 0
    while (length is None or taken < length) and (line := file.readline(documents.LONGEST + 1)):
        size, whole = len(line), line
        while size > documents.LONGEST and not line.endswith(b"\n") and (line := file.readline(_SKIPPED)):
            size += len(line)
        yield whole if size <= documents.LONGEST else size
        taken += size


def read_lines(
    name: str, file: IO[bytes] | gzip.GzipFile, records: Records, first: int = 1, length: int | None = None
) -> Iterator[Document | Bad]:
    """The documents of JSON lines without empty lines; of a damaged .gz what comes before the damage. name: path of the
    file below the root of the corpus; first, length: see ``FilePart``."""
    number = first - 1
    try:
        for number, line in enumerate(bounded_lines(file, length), first):
            if isinstance(line, int):
                yield Bad(f"{name}:{number}", TOO_LONG, f"{line:,} bytes")
            elif line.strip():
                yield _record(f"{name}:{number}", line.rstrip(b"\r\n"), records)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield Bad(f"{name}:{number + 1}", "compressed data are damaged", str(error))
    else:
        if number < first:
            yield Bad(name, "empty")


def text_document(name: str, data: bytes, key: str = "") -> Document | Bad:
    """UTF-8 as one document, line ends as they are."""
    try:
        text = _decoded(data)
    except UnicodeDecodeError as error:
        return _not_utf8(name, error)
    return Document(name, text, key=key) if text else Bad(name, "empty")


def read_parquet(
    name: str, file: IO[bytes], records: Records, begin: int = 0, end: int | None = None
) -> Iterator[Document | Bad]:
    """The documents in rows [begin, end) of a Parquet file, one per row; in messages rows count from 1."""
    try:
        with _opened(file, records) as table:
            names, last = table.schema_arrow.names, table.metadata.num_rows if end is None else end
            columns = columns_of(records, names)
            if columns is None:
                if begin == 0:  # once per file
                    wanted = " or ".join(" and ".join(map(repr, wanted)) for wanted in records.columns)
                    yield Bad(name, f"no column {wanted}", f"it has {', '.join(names) or 'none'}")
                return
            if begin == last:
                yield Bad(name, "empty")
            for row, batch in _batches(table, columns, begin, last):
                if isinstance(batch, str):
                    yield Bad(f"{name}:{row + 1}", TOO_LONG, batch)
                else:
                    yield from _documents(name, row, batch, records)
    except Exception as error:
        problem = parquet_problem(error)
        if problem is None:
            raise
        yield Bad(name, "not readable as Parquet", problem)


def _opened(file: IO[bytes], records: Records) -> ParquetFile:
    """Dictionary-encoded texts stay encoded: thousands of rows can share a long one."""
    from pyarrow import parquet  # slow to import, and few corpora need it

    metadata = parquet.read_metadata(file)
    paths = {metadata.schema.column(place).path for place in range(metadata.num_columns)}
    texts = [name for name in records.texts if name in paths]
    return parquet.ParquetFile(file, metadata=metadata, buffer_size=_BUFFER, read_dictionary=texts)


def parquet_problem(error: Exception) -> str | None:
    """What pyarrow finds wrong with the content of a file; None: ``error`` is of another kind."""
    import pyarrow

    # Its own errors, or a plain OSError without the number that those of the system have.
    if isinstance(error, pyarrow.ArrowException) or (type(error) is OSError and error.errno is None):
        return " ".join(str(error).split())
    return None


def _batches(table: ParquetFile, columns: list[str], begin: int, end: int) -> Iterator[tuple[int, RecordBatch | str]]:
    """Rows [begin, end) a few at a time, each batch with its first row; of a row group whose average row is too long
    only its size, in words."""
    first = 0  # row of the group
    for number in range(table.metadata.num_row_groups):
        group = table.metadata.row_group(number)
        last = first + group.num_rows
        if first < end and begin < last:
            chunks = [group.column(place) for place in range(group.num_columns)]
            size = sum(
                chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.partition(".")[0] in columns
            )
            if size > group.num_rows * documents.LONGEST:
                yield max(first, begin), f"{group.num_rows:,} rows of {size:,} bytes together"
            else:
                rows = max(1, min(_ROWS, _BATCH_BYTES * group.num_rows // max(size, 1)))
                row = first
                for batch in table.iter_batches(batch_size=rows, columns=columns, row_groups=[number]):
                    skipped = max(0, begin - row)
                    yield row + skipped, batch.slice(skipped, max(0, end - row - skipped))
                    row += batch.num_rows
        first = last


def _documents(name: str, row: int, batch: RecordBatch, records: Records) -> Iterator[Document | Bad]:
    """row: number of the first one, from 0."""
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    for place in range(batch.num_rows):
        where = f"{name}:{row + place + 1}"
        size = sum(_bytes(column, place) for column in columns.values()) if batch.nbytes > documents.LONGEST else 0
        if size > documents.LONGEST:
            yield Bad(where, TOO_LONG, f"{size:,} bytes")
            continue
        try:
            record = {name: column[place].as_py() for name, column in columns.items()}
        except (ValueError, OverflowError) as error:  # text in Parquet need not be UTF-8, nor a date before year 9999
            yield Bad(where, "cannot be decoded", str(error))
        else:
            yield records.document(where, record)


def _bytes(column: Array, row: int) -> int:
    """Of the value in one row."""
    if hasattr(column, "dictionary"):
        place = column.indices[row].as_py()
        return 0 if place is None else int(column.dictionary.slice(place, 1).nbytes)
    return int(column.slice(row, 1).nbytes)


def _decoded(data: bytes) -> str:
    """Of bytes, since text mode would change line ends."""
    return data.removeprefix(_BYTE_ORDER_MARK).decode()


def _not_utf8(where: str, error: UnicodeDecodeError) -> Bad:
    return Bad(where, "not UTF-8", f"byte {error.start}: {error.reason}")


def _record(where: str, line: bytes, records: Records) -> Document | Bad:
    try:
        record = json.loads(_decoded(line))
    except UnicodeDecodeError as error:
        return _not_utf8(where, error)
    except json.JSONDecodeError as error:
        return Bad(where, "not JSON", f"{error.msg}, column {error.colno}")
    except (RecursionError, ValueError) as error:  # ValueError: an integer of more digits than Python converts
        return Bad(where, "not JSON", "nested too deep" if isinstance(error, RecursionError) else str(error))
    if not isinstance(record, dict):
        return Bad(where, "not a JSON object", type(record).__name__)
    return records.document(where, record)
