"""Data sets of the Hugging Face hub as a corpus in units, with or without a copy on disk.

The library ``datasets`` reads them. What is done here is what it leaves to its caller: to find out in seconds whether
the hub answers, and to go on with the copy in the cache if it does not; to cut a data set into units; to take a part of
it evenly; to name its content by a fingerprint; and to say in one line what is wrong. Code that comes with a data set
is never run.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridlm.config.data import HfConfig
from hybridlm.data.reading.documents import Bad, Document, Records
from hybridlm.data.reading.hub_access import Access, ask_hub, quiet, refusal, unreachable
from hybridlm.data.reading.units import Corpus, Unit
from hybridlm.errors import ConfigError, UserError
from hybridlm.files.home import expanded

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder, IterableDataset

_MB = 1_000_000
_STRETCHES = 16  # a part of a data set comes from so many places of it at least
_FILE_MB = 64  # a part of a stream opens one more file for so much text
_BATCH_BYTES = 4 * _MB
_BATCH_ROWS = 1000
_STREAM_ROWS = 64


@dataclass(frozen=True)
class TableUnit:
    """Rows [begin, end) of a data set on disk, numbered over its whole split. The table pickles as the names of its
    files.

    size: bytes of their text, estimated; share: bytes of text after which it ends early, None: never.
    """

    table: Dataset
    name: str
    records: Records
    begin: int
    end: int
    size: int
    share: int | None

    def documents(self) -> Iterator[Document | Bad]:
        found = (
            self.records.document(f"{self.name}:{row}", record) for row, record in enumerate(self._rows(), self.begin)
        )
        return _until(found, self.share)

    def _rows(self) -> Iterator[Mapping[str, Any]]:
        rows = self.end - self.begin
        step = max(1, min(_BATCH_ROWS, _BATCH_BYTES * rows // max(self.size, 1)))
        for first in range(self.begin, self.end, step):
            yield from _records(self.table[first : min(first + step, self.end)])


@dataclass(frozen=True)
class StreamUnit:
    """Some files of a data set that is read where it lies; rows are numbered from 0 in each unit. size, share: as in a
    TableUnit.

    ConfigError, while it is read: the network fails, or a file is no data.
    """

    stream: IterableDataset
    config: HfConfig
    records: Records
    index: int
    size: int
    share: int | None

    def documents(self) -> Iterator[Document | Bad]:
        name = f"{self.config.id}/{self.index}"
        found = (self.records.document(f"{name}:{row}", record) for row, record in enumerate(self._rows()))
        return _until(found, self.share)

    def _rows(self) -> Iterator[Mapping[str, Any]]:
        try:
            for batch in self.stream.iter(batch_size=_STREAM_ROWS):
                yield from _records(batch)
        except Exception as error:  # of whichever library reads the files
            raise refusal(self.config, error) from error


@dataclass(frozen=True)
class AbsentUnit:
    """A streamed data set that cannot be reached now: enough to find what was prepared from it earlier. Reading it is a
    ConfigError."""

    problem: str
    size: int = 0

    def documents(self) -> Iterator[Document | Bad]:
        raise UserError(self.problem)


def open_hub(config: HfConfig, records: Records, unit_bytes: int) -> Corpus:
    """A data set as units: of rows with about ``unit_bytes`` of text each, or with ``data.hf.streaming`` one per file.

    With ``data.hf.limit_mb`` every unit gives its first documents until it has its even share of them: of a data set on
    disk, 16 stretches or more that lie evenly in it; of a stream, evenly chosen groups of files, one for 64 MB and as
    many as there are files at most. A share ends with the document that fills it, so a little more than the limit is
    taken. Always the same documents for the same config.

    The fingerprint of a data set of the hub holds its commit, that of a folder the content of its files, which are read
    for it.

    ConfigError: the data set, its configuration, split or revision is unknown, its columns are not those of
    ``records``, it is gated or would need code to be run, or the hub does not answer and there is no copy in the cache.
    """
    if config.id is None:
        raise ConfigError("data.source=hf needs data.hf.id: owner/name of a data set on the hub, or a local folder")
    folder = _folder(config)
    access = ask_hub(config) if folder is None else Access()
    with quiet(offline=bool(access.offline)):
        if access.offline and config.streaming:
            problem = unreachable(config, access.offline, "data.hf.streaming=true keeps no copy of it")
            if access.commit is None:
                raise UserError(problem)
            return Corpus([AbsentUnit(problem)], _fingerprint(config, records, access.commit, ()))
        try:
            builder = _builder(config, folder, access)
            content = _content(builder, folder)
            if config.streaming:
                units: Sequence[Unit] = _stream_units(builder, config, records)
                return Corpus(units, _fingerprint(config, records, content, ()))
            tables = _table_units(builder, config, records, unit_bytes)
            return Corpus(tables, _fingerprint(config, records, content, [(unit.begin, unit.end) for unit in tables]))
        except (
            Exception
        ) as error:  # datasets has no common base for what it raises when it reads, parses and asks the network
            raise refusal(config, error, access) from error


def _folder(config: HfConfig) -> Path | None:
    """The local folder that ``data.hf.id`` names, if it names one."""
    name = config.id or ""
    path = expanded(name)
    if path.is_dir():
        if config.revision is not None:
            raise ConfigError(
                f"data.hf.revision={config.revision}: data.hf.id={name} is a local folder, which has none; leave it"
                " null"
            )
        return path.resolve()
    if path.is_file():
        raise ConfigError(
            f"data.hf.id={name} is a file: legal is a folder of such files, or data.source=files with data.path={name}"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise ConfigError(
            f"data.hf.id={name} is no folder (seen from {Path.cwd()}) and no owner/name of a data set on the hub"
        )
    return None


def _builder(config: HfConfig, folder: Path | None, access: Access) -> DatasetBuilder:
    """What reads the data set; the split is known to exist as far as that can be told before anything is downloaded."""
    from datasets import load_dataset_builder

    # By its commit, so that all of it is of one state even if the data set changes meanwhile.
    builder = load_dataset_builder(str(folder or config.id), config.name, revision=access.commit)
    if access.offline and config.revision is not None and builder.hash != access.commit:
        raise UserError(
            unreachable(
                config,
                access.offline,
                f"its newest copy in the cache is of commit {builder.hash}, not of {config.revision}",
            )
        )
    if builder.config.data_files:
        _check_split(config, [str(split) for split in builder.config.data_files])
    return builder


def _check_split(config: HfConfig, legal: Sequence[str]) -> None:
    if config.streaming and "[" in config.split:
        raise ConfigError(
            f"data.hf.split={config.split}: a part of a split cannot be streamed; use data.hf.limit_mb, or"
            " streaming=false"
        )
    unknown = [name for part in config.split.split("+") if (name := part.split("[")[0].strip()) not in {*legal, "all"}]
    if unknown:
        raise ConfigError(
            f"data.hf.split={config.split}: data.hf.id={config.id} has no split {unknown[0]!r}, legal is"
            f" {', '.join(legal)}"
        )


def _content(builder: DatasetBuilder, folder: Path | None) -> str:
    """Names what the files hold: the commit, or the hash of a folder's files in order (and of its card, which can say
    how to read them)."""
    if folder is None:
        return str(builder.hash)
    digest = hashlib.sha256()
    paths = [Path(file) for files in (builder.config.data_files or {}).values() for file in files]
    for path in [folder / "README.md", *paths]:
        if path.is_file():
            digest.update(
                path.relative_to(folder).as_posix().encode() if path.is_relative_to(folder) else path.name.encode()
            )
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _fingerprint(config: HfConfig, records: Records, content: str, cut: Sequence[tuple[int, int]]) -> str:
    what = [content, config.id, config.name, config.split, config.streaming, config.limit_mb, repr(records), list(cut)]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _table_units(builder: DatasetBuilder, config: HfConfig, records: Records, unit_bytes: int) -> list[TableUnit]:
    builder.download_and_prepare()
    _check_split(config, [str(split) for split in builder.info.splits or ()])
    table = builder.as_dataset(split=config.split)
    if not len(table):
        raise ConfigError(f"data.hf.split={config.split} of data.hf.id={config.id} has no rows")
    table = table.select_columns(list(_columns(config, records, table.column_names)))
    sizes = [(batch.num_rows, batch.nbytes) for batch in table.data.to_batches()]
    total = sum(size for _, size in sizes)
    limit = None if config.limit_mb is None or config.limit_mb * _MB >= total else config.limit_mb * _MB
    count = math.ceil(total / unit_bytes) if limit is None else max(math.ceil(limit / unit_bytes), _STRETCHES)
    share = None if limit is None else math.ceil(limit / count)
    cuts = _cuts(sizes, count)
    return [
        TableUnit(table, str(config.id), records, begin, end, total // count if share is None else share, share)
        for begin, end in pairwise(cuts)
    ]


def _cuts(sizes: Sequence[tuple[int, int]], count: int) -> list[int]:
    """Rows at which ``count`` pieces (fewer if there are fewer rows) of about the same bytes begin, and the end.

    sizes: rows and bytes of the table's batches.
    """
    import numpy as np

    rows = np.cumsum([0] + [number for number, _ in sizes])
    bytes_ = np.cumsum(
        [0] + [number + size for number, size in sizes]
    )  # a row without text takes room too, so that it rises everywhere
    places = np.interp(np.linspace(0, bytes_[-1], count + 1), bytes_, rows)
    return sorted({round(place) for place in places.tolist()})


def _stream_units(builder: DatasetBuilder, config: HfConfig, records: Records) -> list[StreamUnit]:
    stream = builder.as_streaming_dataset(split=config.split)
    known = stream.column_names
    columns = _columns(config, records, known if known is not None else list(next(iter(stream), {})))
    if known is not None:
        stream = stream.select_columns(list(columns))
    files = stream.num_shards
    count = files if config.limit_mb is None else min(files, math.ceil(config.limit_mb / _FILE_MB))
    share = None if config.limit_mb is None else math.ceil(config.limit_mb * _MB / count)
    split = (builder.info.splits or {}).get(config.split)
    size = (split.num_bytes or 0) // count if split is not None else 0
    if share is not None:
        size = min(size, share) if size else share
    return [StreamUnit(stream.shard(count, index), config, records, index, size, share) for index in range(count)]


def _columns(config: HfConfig, records: Records, present: Sequence[str]) -> tuple[str, ...]:
    """The first set of columns that is there."""
    for columns in records.columns:
        if set(columns) <= set(present):
            return (*columns, *(name for name in records.optional if name in present))
    needed = " or ".join(" and ".join(columns) for columns in records.columns)
    raise ConfigError(
        f"data.hf.id={config.id} has the columns {', '.join(present) or '(none)'}, needed: {needed} (see"
        " data.text_field)"
    )


def _records(batch: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """The rows of a batch of columns."""
    return (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


def _until(found: Iterable[Document | Bad], share: int | None) -> Iterator[Document | Bad]:
    """All of it, or up to the document with which ``share`` bytes of text are reached."""
    taken = 0
    for one in found:
        yield one
        if share is not None and isinstance(one, Document):
            taken += len(one.text.encode()) + sum(len(turn.content.encode()) for turn in one.turns)
            if taken >= share:
                return
