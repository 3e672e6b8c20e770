"""Data sets of the Hugging Face hub, or local folders that the ``datasets`` library understands, as files.

``datasets`` resolves a data set, its configuration and its splits, and downloads it into Parquet files; streamed, the
data set's own Parquet and JSON lines files are opened where they are. Either way the readers of local files read them.
Code that comes with a data set is never run.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from hybridlm.config.data import CorpusConfig, HfConfig
from hybridlm.data.reading.conversations import records_of
from hybridlm.data.reading.documents import Bad, Corpus, Document, Records, Unit
from hybridlm.data.reading.file_units import ParquetRows, SourceFile, WholeFile
from hybridlm.data.reading.hub_access import Access, ask_hub, quiet, refusal, unreachable
from hybridlm.data.reading.readers import kind_of
from hybridlm.data.reading.scan import row_groups
from hybridlm.errors import ConfigError, UserError
from hybridlm.files.home import expanded

if TYPE_CHECKING:
    from datasets import DatasetBuilder

_MB = 1_000_000
_STRETCHES = 16  # a part of a data set comes from at least this many places of it
_BUFFER = 1 << 20  # bytes of a remote file at a time
_FILE_MB = 64  # a part of a stream opens one more file per this much text


@dataclass(frozen=True)
class RemoteFile:
    """A file of a streamed data set: a URL of the hub."""

    name: str
    url: str
    config: HfConfig

    @contextlib.contextmanager
    def opened(self) -> Iterator[IO[bytes]]:
        """UserError: the network fails."""
        import fsspec

        try:
            with fsspec.open(self.url) as file:
                yield io.BufferedReader(file, _BUFFER)  # fsspec's own readline takes no limit
        except Exception as error:  # of whichever library does the transfer
            raise refusal(self.config, error) from error


@dataclass(frozen=True)
class Share:
    """Units read one after the other, up to the document with which ``share`` bytes of text are reached; None: to the
    end."""

    units: tuple[Unit, ...]
    size: int
    share: int | None = None

    def documents(self) -> Iterator[Document | Bad]:
        taken = 0
        for one in chain.from_iterable(unit.documents() for unit in self.units):
            yield one
            if self.share is not None and isinstance(one, Document):
                taken += sum(len(text.encode()) for text in one.texts)
                if taken >= self.share:
                    return


@dataclass(frozen=True)
class Unreachable:
    """A streamed data set that cannot be reached now: enough to find what was prepared from it before. Reading it is a
    UserError."""

    problem: str
    size: int = 0

    def documents(self) -> Iterator[Document | Bad]:
        raise UserError(self.problem)


def open_hub(config: CorpusConfig, unit_bytes: int, cache: Path, progress: Callable[[int], None]) -> Corpus:
    """``data.source=hf``. cache: the folder for downloaded data sets.

    With ``data.hf.limit_mb`` every unit gives its first documents until it has its even share of the limit: of a
    downloaded data set up to 16 or more evenly spaced stretches; of a stream, groups of files, one group per 64 MB. A
    share ends with the document that fills it, so slightly more than the limit is taken; the same documents every time.

    The fingerprint covers the commit of a data set of the hub, or the content of a local folder.

    ConfigError: the data set, its configuration, split or revision is unknown. UserError: it is gated or would need
    code to be run, or the hub does not answer and there is no copy.
    """
    hf, records = config.hf, records_of(config)
    folder = _local_folder(hf)
    access = Access(_content(folder)) if folder is not None else ask_hub(hf, cache)
    facts = [access.commit, hf.id, hf.name, hf.split, hf.streaming, hf.limit_mb, repr(records), unit_bytes]
    fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    if hf.streaming and access.offline:
        problem = unreachable(hf, access.offline, "data.hf.streaming=true keeps no copy of it")
        if access.commit is None:
            raise UserError(problem)
        return Corpus([Unreachable(problem)], fingerprint)
    try:
        with quiet():
            if hf.streaming:
                return Corpus(_streamed(hf, records, folder, access), fingerprint)
            return Corpus(_downloaded(hf, records, unit_bytes, folder, access, cache), fingerprint)
    except Exception as error:  # datasets has no common base for what it raises
        raise refusal(hf, error) from error


def _local_folder(config: HfConfig) -> Path | None:
    """The local folder that ``data.hf.id`` names, if it does."""
    name = str(config.id)
    path = expanded(name)
    if path.is_dir():
        if config.revision is not None:
            raise ConfigError(
                f"data.hf.revision={config.revision}: data.hf.id={name} is a local folder, which has no revisions; set"
                " it to null"
            )
        return path.resolve()
    if path.is_file():
        raise ConfigError(
            f"data.hf.id={name} is a file; expected a folder of such files, or data.source=files with data.path={name}"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise ConfigError(
            f"data.hf.id={name} is neither a folder (relative to {Path.cwd()}) nor owner/name of a data set on the hub"
        )
    return None


def _content(folder: Path) -> str:
    """The hash of a folder's files, its card included, which can say how to read the others."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode("utf-8", "surrogateescape"))
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _builder(config: HfConfig, folder: Path | None, access: Access) -> DatasetBuilder:
    """What knows the files of the data set, by split."""
    from datasets import load_dataset_builder

    # By its commit, so that all of it is of one state even if the data set changes meanwhile.
    revision = None if folder is not None else access.commit
    builder = load_dataset_builder(str(folder or config.id), config.name, revision=revision)
    _split_names(config, builder.config.data_files or {})
    return builder


def _split_names(config: HfConfig, known: Iterable[object]) -> list[str]:
    """The splits that ``data.hf.split`` names. ConfigError: one is not ``known``."""
    legal = [str(split) for split in known]
    names = [part.split("[")[0].strip() for part in config.split.split("+")]
    if unknown := [name for name in names if name not in {*legal, "all"}]:
        raise ConfigError(
            f"data.hf.split={config.split}: data.hf.id={config.id} has no split {unknown[0]!r}; it has"
            f" {', '.join(legal)}"
        )
    return legal if "all" in names else names


def _downloaded(
    config: HfConfig, records: Records, unit_bytes: int, folder: Path | None, access: Access, cache: Path
) -> list[Share]:
    """The rows of the split, from Parquet files that are written once per commit."""
    made_of = json.dumps([config.id, config.name, access.commit])
    place = cache / "hub" / hashlib.sha256(made_of.encode()).hexdigest()[:16]
    if not place.exists():
        if access.offline:
            raise UserError(unreachable(config, access.offline, "it has not been downloaded before"))
        _builder(config, folder, access).download_and_prepare(str(place), file_format="parquet")
    groups = list(_row_groups(config, records, place))
    total, limit = sum(group.size for group in groups), (config.limit_mb or 0) * _MB
    whole = not 0 < limit < total
    count = math.ceil(total / unit_bytes) if whole else max(math.ceil(limit / unit_bytes), _STRETCHES)
    pieces: dict[int, list[Unit]] = {}
    done = 0
    for group in groups:
        pieces.setdefault(done * count // total, []).append(group)
        done += group.size
    if not whole:
        return _shares(pieces.values(), limit)
    return [Share(tuple(units), sum(unit.size for unit in units)) for units in pieces.values()]


def _row_groups(config: HfConfig, records: Records, place: Path) -> Iterator[ParquetRows]:
    """The rows of the split, one unit per row group."""
    from datasets import DatasetInfo
    from datasets.arrow_reader import ParquetReader

    info = DatasetInfo.from_directory(str(place))
    splits: Any = info.splits or {}
    names = _split_names(config, splits)
    wanted = "+".join(names) if config.split == "all" else config.split
    reader = ParquetReader(str(place), info)
    for part in reader.get_file_instructions(info.dataset_name, wanted, list(splits.values())):
        source = SourceFile(Path(part["filename"]).name, Path(part["filename"]))
        with source.opened() as file:
            groups = row_groups(file)
        first, last = 0, part["skip"] + part["take"] if part["take"] >= 0 else math.inf
        for rows, size in groups:
            begin, end = max(first, part["skip"]), int(min(first + rows, last))
            if begin < end:
                yield ParquetRows(source, records, begin, end, max(1, size * (end - begin) // rows))
            first += rows


def _streamed(config: HfConfig, records: Records, folder: Path | None, access: Access) -> list[Share]:
    """The files of the split, one unit each, or with a limit one for each group of files."""
    if "[" in config.split:
        raise ConfigError(
            f"data.hf.split={config.split}: a slice of a split cannot be streamed; use data.hf.limit_mb, or"
            " data.hf.streaming=false"
        )
    files: Any = _builder(config, folder, access).config.data_files or {}
    units = []
    for url in (str(url) for name in _split_names(config, files) for url in files[name]):
        kind, name = kind_of(url), url.rsplit("/", 1)[-1]
        if kind == "text":
            raise ConfigError(
                f"data.hf.streaming=true reads .parquet, .jsonl and .jsonl.gz, and data.hf.id={config.id} has {name}:"
                " set data.hf.streaming=false, or data.hf.revision=refs/convert/parquet for the hub's own Parquet copy"
            )
        file = RemoteFile(name, url, config) if folder is None else SourceFile(name, Path(url))
        units.append(WholeFile(file, records, kind, 0))
    if config.limit_mb is None:
        return [Share((unit,), 0) for unit in units]
    count = min(len(units), math.ceil(config.limit_mb / _FILE_MB))
    edges = [len(units) * number // count for number in range(count + 1)]
    return _shares([units[begin:end] for begin, end in pairwise(edges)], config.limit_mb * _MB)


def _shares(pieces: Collection[Sequence[Unit]], limit: int) -> list[Share]:
    """Units that give ``limit`` bytes together."""
    share = math.ceil(limit / len(pieces))
    return [Share(tuple(units), share, share) for units in pieces]
