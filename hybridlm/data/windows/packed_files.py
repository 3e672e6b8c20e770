"""The packing of a stream, stored on disk: every piece of the stream is packed into its own file, with an index of
all files.

A file is a line of JSON that describes it, padded to ``_HEADER`` bytes, followed by the arrays of ``Packing`` in one
integer type, so that it can be mapped. The index repeats the counts of all files: opening a stream of 60,000 pieces
reads the index and checks file sizes. A file is compared with its SHA-256 when this process first touches it. Missing,
damaged and outdated files are silently rebuilt; where nothing can be written, packings are held in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hybridlm.data.files.mapped import Mapped
from hybridlm.data.files.stream import TokenStream, opened
from hybridlm.data.keep import keep_json, kept_json
from hybridlm.data.windows.packing import Packing, document_starts, pack
from hybridlm.errors import UserError
from hybridlm.files.durable import replaced
from hybridlm.files.plain import open_regular, parse_json

FORMAT_VERSION = 2
_HEADER = 512  # bytes
_INDEX = "index.json"


class _Counts(NamedTuple):
    """Of a piece's packing: windows, pieces in them, pairs in these, and bytes per integer in its file."""

    windows: int
    pieces: int
    pairs: int
    width: int

    @property
    def dtype(self) -> str:
        return f"<u{self.width}"

    @property
    def file_size(self) -> int:
        return _HEADER + self.width * (2 * self.pieces + 2 * self.windows + 1) if self.windows else 0


class PackedStream:
    """All windows of a stream, numbered piece after piece. It holds a few numbers per piece and is picklable.

    len() is the number of windows; efficiency: the share of columns that hold a pair.
    """

    def __init__(self, stream: TokenStream, seq_len: int, *, eos_id: int, folder: Path) -> None:
        """Packs what ``folder`` does not hold yet. eos_id: where documents end in files without an index of documents.

        UserError: there is no document.
        """
        self.stream, self.seq_len, self._eos_id, self._folder = stream, seq_len, eos_id, folder
        self._sound: set[int] = set()  # pieces whose files have been compared with their hashes
        self._unwritten: dict[int, Packing] = {}  # of pieces whose files could not be written
        self._identity = object()  # a file may be rebuilt between two packings over it
        self._counts = np.array(self._all_counts(), dtype=np.int64)  # (pieces, 4)
        # (pieces + 1,): the first window of each piece, and the end
        self.firsts = np.concatenate([[0], np.cumsum(self._counts[:, 0])])
        if not len(self):
            raise UserError("the text holds no document, so there is nothing to pack into windows (data.packing)")
        self.efficiency = float(self._counts[:, 2].sum() / (len(self) * seq_len))

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def piece(self, number: int) -> Packing:
        """The packing of one piece of the stream, memory-mapped; its positions are those in ``Arrays.closed``."""
        return opened((self._identity, number), lambda: self._open(number))

    def _open(self, number: int) -> tuple[Packing, Sequence[Mapped]]:
        counts, path = _Counts(*self._counts[number].tolist()), self._path(number)
        if number not in self._sound and number not in self._unwritten:
            if not _is_sound(path, counts, self._key(number)):
                self._make(number)
            self._sound.add(number)
        if number in self._unwritten:
            return self._unwritten[number], []
        file = Mapped(path)
        data = file.array(counts.dtype, _HEADER)
        windows = data[2 * counts.pieces : 2 * counts.pieces + counts.windows + 1]
        targets = data[2 * counts.pieces + counts.windows + 1 :]
        return Packing(data[: 2 * counts.pieces].reshape(-1, 2), windows, targets, self.seq_len), [file]

    def _all_counts(self) -> list[_Counts]:
        keys = [self._key(number) for number in range(len(self.stream.pieces))]
        index = {key: _Counts(*counts) for key, counts in kept_json(self._folder / _INDEX).items()}
        known = {
            key: index[key]
            for number, key in enumerate(keys)
            if key in index and _size(self._path(number)) == index[key].file_size
        }
        missing = [number for number, key in enumerate(keys) if key not in known]
        for number in missing:  # packed, but killed before the index was written; or not packed at all
            known[keys[number]] = _counts_in(self._path(number), keys[number]) or self._make(number)
        if missing:
            keep_json(self._folder / _INDEX, {key: known[key] for key in keys})
        return [known[key] for key in keys]

    def _make(self, number: int) -> _Counts:
        """Packs a piece and writes its file."""
        this = self.stream.pieces[number]
        tokens, learned, starts = this.tokens(), this.learned(), this.starts()
        if starts is None:
            starts = document_starts(tokens, self._eos_id)
        if starts.size < 2:
            return _Counts(0, 0, 0, 4)
        packing = pack(starts, self.seq_len)
        if learned is not None:
            packing = packing.counting(learned)
        counts = _Counts(len(packing), len(packing.pieces), packing.pairs, 4 if int(starts[-1]) < 1 << 32 else 8)
        arrays = [
            array.astype(counts.dtype).reshape(-1) for array in (packing.pieces, packing.windows, packing.targets)
        ]
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with replaced(self._path(number)) as partial, partial.open("wb") as file:
                file.writelines([_header(counts, self._key(number), arrays), *(array.tobytes() for array in arrays)])
        except OSError:
            self._unwritten[number] = packing
        return counts

    def _path(self, number: int) -> Path:
        return self._folder / f"{self._key(number)[:32]}.bin"

    def _key(self, number: int) -> str:
        """Hash of what the packing of a piece depends on."""
        this = self.stream.pieces[number]
        eos = self._eos_id if this.documents is None else None
        made_of = [FORMAT_VERSION, this.key, this.offset, this.count, this.masked, self.seq_len, eos]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


def _header(counts: _Counts, key: str, arrays: Iterable[np.ndarray]) -> bytes:
    digest = hashlib.sha256(json.dumps([*counts, key]).encode())
    for array in arrays:
        digest.update(array.data)
    line = json.dumps({"facts": counts, "key": key, "sha256": digest.hexdigest()})
    return line.encode().ljust(_HEADER - 1) + b"\n"


def _counts_in(path: Path, key: str) -> _Counts | None:
    """The counts in a file's header; None: there is no such file, or it is not what ``key`` names."""
    try:
        with open_regular(path) as file:
            content: Any = parse_json(file.read(_HEADER))
        counts = _Counts(*map(int, content["facts"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return counts if content["key"] == key and _size(path) == counts.file_size else None


def _is_sound(path: Path, counts: _Counts, key: str) -> bool:
    """Whether all of a file is as it was written."""
    if _counts_in(path, key) != counts:
        return False
    with path.open("rb") as file:
        return file.read(_HEADER) == _header(counts, key, [Mapped(path).array("u1", _HEADER)])


def _size(path: Path) -> int:
    """Bytes of a file; 0: there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
