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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from hybridlm.config.data import CorpusConfig, HfConfig
from hybridlm.data.reading.documents import Corpus, Records, Unit
from hybridlm.data.reading.file_units import FilePart, SourceFile, Together
from hybridlm.data.reading.hub_access import Access, ask_hub, quiet, refusal, unreachable
from hybridlm.data.reading.readers import kind_of
from hybridlm.data.reading.records import records_of
from hybridlm.data.reading.scan import row_groups
from hybridlm.errors import ConfigError
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


def open_hub(config: CorpusConfig, unit_bytes: int, cache: Path, progress: Callable[[int], None]) -> Corpus:
    """``data.source=hf``. cache: the folder for downloaded data sets.

    With ``data.hf.limit_mb`` every unit gives its first documents until it has its share of the limit: of a downloaded
    data set 16 or more evenly spaced stretches of row groups; of a stream, groups of files, one group per 64 MB. A
    share ends with the document that fills it, so slightly more than the limit is taken; the same documents every time.

    The fingerprint covers the commit of a data set of the hub, or the content of a local folder.

    ConfigError: the data set, its configuration, split or revision is unknown. UserError: it is gated or would need
    code to be run, or the hub does not answer and there is no copy.
    """
    hf, records = config.hf, records_of(config)
    access = _local(hf) or ask_hub(hf, cache)
    facts = [access.state, hf.id, hf.name, hf.split, hf.streaming, hf.limit_mb, repr(records), unit_bytes]
    fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    try:
        with quiet():
            shares = (
                _streamed(hf, records, access) if hf.streaming else _downloaded(hf, records, unit_bytes, access, cache)
            )
    except Exception as error:  # datasets has no common base for what it raises
        raise refusal(hf, error) from error
    return Corpus(shares, fingerprint)


def _local(config: HfConfig) -> Access | None:
    """The local folder that ``data.hf.id`` names, if it does; its state is the hash of its files, the card included,
    which can say how to read the others."""
    name = str(config.id)
    path = expanded(name)
    if path.is_file():
        raise ConfigError(
            f"data.hf.id={name} is a file; expected a folder of such files, or data.source=files with data.path={name}"
        )
    if not path.is_dir():
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
            return None
        raise ConfigError(
            f"data.hf.id={name} is neither a folder (relative to {Path.cwd()}) nor owner/name of a data set on the hub"
        )
    if config.revision is not None:
        raise ConfigError(
            f"data.hf.revision={config.revision}: data.hf.id={name} is a local folder, which has no revisions; set it"
            " to null"
        )
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        digest.update(file.relative_to(path).as_posix().encode("utf-8", "surrogateescape"))
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return Access(str(path.resolve()), state=digest.hexdigest())


def _builder(config: HfConfig, access: Access) -> DatasetBuilder:
    """What knows the files of the data set, by split."""
    from datasets import load_dataset_builder

    # By its commit, so that all of it is of one state even if the data set changes meanwhile.
    builder = load_dataset_builder(access.source, config.name, revision=access.revision)
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


def _downloaded(config: HfConfig, records: Records, unit_bytes: int, access: Access, cache: Path) -> list[Together]:
    """The rows of the split, from Parquet files that are written once per commit."""
    made_of = json.dumps([config.id, config.name, access.state])
    place = cache / "hub" / hashlib.sha256(made_of.encode()).hexdigest()[:16]
    if not place.exists():
        if access.offline:
            raise unreachable(config, access.offline, "it has not been downloaded before")
        _builder(config, access).download_and_prepare(str(place), file_format="parquet")
    groups = list(_row_groups(config, records, place))
    sizes, limit = [group.size for group in groups], (config.limit_mb or 0) * _MB
    if not 0 < limit < sum(sizes):
        return [Together(units, size) for units, size in _evenly(groups, sizes, math.ceil(sum(sizes) / unit_bytes))]
    shares = _evenly(groups, sizes, max(math.ceil(limit / unit_bytes), _STRETCHES))
    parts = [(units, math.ceil(limit * size / sum(sizes))) for units, size in shares]
    return [Together(units, part, part) for units, part in parts]


def _evenly(units: Sequence[Unit], sizes: Sequence[int], count: int) -> list[tuple[tuple[Unit, ...], int]]:
    """Consecutive ``units`` together, with their size: at most ``count`` groups of about the same size."""
    groups: dict[int, list[int]] = {}
    for number, before in zip(range(len(units)), accumulate(sizes, initial=0), strict=False):
        groups.setdefault(before * count // sum(sizes), []).append(number)
    return [
        (tuple(units[number] for number in group), sum(sizes[number] for number in group)) for group in groups.values()
    ]


def _row_groups(config: HfConfig, records: Records, place: Path) -> Iterator[FilePart]:
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
                yield FilePart(source, records, "parquet", begin, end, size=max(1, size * (end - begin) // rows))
            first += rows


def _streamed(config: HfConfig, records: Records, access: Access) -> list[Together]:
    """The files of the split, one unit each, or with a limit one for each group of files."""
    if access.offline:
        problem = unreachable(config, access.offline, "data.hf.streaming=true keeps no copy of it")
        if access.state is None:
            raise problem
        return [Together((), 0, problem=problem)]
    if "[" in config.split:
        raise ConfigError(
            f"data.hf.split={config.split}: a slice of a split cannot be streamed; use data.hf.limit_mb, or"
            " data.hf.streaming=false"
        )
    files: Any = _builder(config, access).config.data_files or {}
    units = []
    for url in (str(url) for name in _split_names(config, files) for url in files[name]):
        kind, name = kind_of(url), url.rsplit("/", 1)[-1]
        if kind == "text":
            raise ConfigError(
                f"data.hf.streaming=true reads .parquet, .jsonl and .jsonl.gz, and data.hf.id={config.id} has {name}:"
                " set data.hf.streaming=false, or data.hf.revision=refs/convert/parquet for the hub's own Parquet copy"
            )
        file = SourceFile(name, Path(url)) if access.revision is None else RemoteFile(name, url, config)
        units.append(FilePart(file, records, kind))
    if config.limit_mb is None:
        return [Together((unit,), 0) for unit in units]
    count = min(len(units), math.ceil(config.limit_mb / _FILE_MB))
    share = math.ceil(config.limit_mb * _MB / count)
    return [Together(group, share, share) for group, _ in _evenly(units, [1] * len(units), count)]
