"""The packing of a stream, stored on disk: every piece of the stream is packed into its own file, with an index of
all files.

A file holds the arrays of ``Packing`` one after the other as little-endian int64, so that it can be mapped. The index
has the counts and the SHA-256 of every file: opening a stream of 60,000 pieces reads the index and checks file sizes. A
file is compared with its hash when this process first touches it. Missing, damaged and outdated files are silently
rebuilt; where nothing can be written, packings are held in memory.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hybridlm.data.files.stream import Mapped, TokenStream, opened
from hybridlm.data.keep import keep_json, kept_json
from hybridlm.data.windows.packing import Packing, document_starts, pack
from hybridlm.errors import RunFailed, UserError
from hybridlm.files.durable import replaced

FORMAT_VERSION = 3
_INDEX = "index.json"
_EVERY = 30.0  # seconds of packing between two writes of the index: so much is lost by a kill


class _Counts(NamedTuple):
    """Of a piece's packing: windows, pieces in them, pairs in these, and the hash of its file."""

    windows: int
    pieces: int
    pairs: int
    sha256: str

    @property
    def file_size(self) -> int:
        return 8 * (2 * self.pieces + 2 * self.windows + 1)


class PackedStream:
    """All windows of a stream, numbered piece after piece. It holds a few facts per piece and is picklable.

    len() is the number of windows; efficiency: the share of columns that hold a pair.
    """

    def __init__(self, stream: TokenStream, seq_len: int, *, eos_id: int, folder: Path) -> None:
        """Packs what ``folder`` does not hold yet. eos_id: where documents end in files without an index of documents.

        UserError: there is no document.
        """
        self.stream, self.seq_len, self._eos_id, self._folder = stream, seq_len, eos_id, folder
        self._sound: set[int] = set()  # pieces whose files have been compared with their hashes
        self._unwritten: dict[int, Packing] = {}  # of pieces whose files could not be written
        self._keys = [self._key(number) for number in range(len(stream.pieces))]
        self._counts = self._all_counts()
        # (pieces + 1,): the first window of each piece, and the end
        self.firsts = np.cumsum([0, *(counts.windows for counts in self._counts)], dtype=np.int64)
        if not len(self):
            raise UserError("the text holds no document, so there is nothing to pack into windows (data.packing)")
        self.efficiency = sum(counts.pairs for counts in self._counts) / (len(self) * seq_len)

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def piece(self, number: int) -> Packing:
        """The packing of one piece of the stream, memory-mapped; its positions are those of ``Piece.tokens``."""
        return opened(self._open, number)

    def _open(self, number: int) -> tuple[Packing, Sequence[Mapped]]:
        if number not in self._sound and number not in self._unwritten:
            if not self._is_sound(number):
                self._make(number)
            self._sound.add(number)
        if number in self._unwritten:
            return self._unwritten[number], []
        counts, file = self._counts[number], Mapped(self._path(number))
        data = file.array("<i8", 0, counts.file_size // 8)
        pieces, windows, targets = np.split(data, [2 * counts.pieces, 2 * counts.pieces + counts.windows + 1])
        return Packing(pieces.reshape(-1, 2), windows, targets, self.seq_len), [file]

    def _all_counts(self) -> list[_Counts]:
        index = {key: _Counts(*counts) for key, counts in kept_json(self._folder / _INDEX).items()}
        known = {
            key: index[key]
            for number, key in enumerate(self._keys)
            if key in index and _size(self._path(number)) == index[key].file_size
        }
        missing = [number for number, key in enumerate(self._keys) if key not in known]
        written = time.monotonic()
        for number in missing:
            known[self._keys[number]] = self._make(number)
            if number == missing[-1] or time.monotonic() - written > _EVERY:
                keep_json(self._folder / _INDEX, known)
                written = time.monotonic()
        return [known[key] for key in self._keys]

    def _is_sound(self, number: int) -> bool:
        try:
            data = Mapped(self._path(number)).array("u1")
        except RunFailed:  # it is missing or empty
            return False
        return hashlib.sha256(data.data).hexdigest() == self._counts[number].sha256

    def _make(self, number: int) -> _Counts:
        """Packs a piece and writes its file."""
        this = self.stream.pieces[number]
        tokens, learned, starts = this.tokens(), this.learned(), this.starts()
        if starts is None:
            starts = document_starts(tokens, self._eos_id)
        packing = pack(starts, self.seq_len)
        if learned is not None and len(packing):
            packing = packing.counting(learned)
        data = np.concatenate([packing.pieces.reshape(-1), packing.windows, packing.targets]).astype("<i8").tobytes()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with replaced(self._path(number)) as partial:
                partial.write_bytes(data)
        except OSError:
            self._unwritten[number] = packing
        return _Counts(len(packing), len(packing.pieces), packing.pairs, hashlib.sha256(data).hexdigest())

    def _path(self, number: int) -> Path:
        return self._folder / f"{self._keys[number][:32]}.bin"

    def _key(self, number: int) -> str:
        """Hash of what the packing of a piece depends on."""
        this = self.stream.pieces[number]
        eos = self._eos_id if this.documents is None else None
        made_of = [FORMAT_VERSION, this.key, this.offset, this.count, this.masked, self.seq_len, eos]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


def _size(path: Path) -> int:
    """Bytes of a file; 0: there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
