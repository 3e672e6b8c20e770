"""The packing of a stream, kept on disk: every piece of the stream packed by itself, a file for each, and an index of
all.

A file is a line of JSON that says what it is, filled up to ``_HEADER`` bytes, and after it the arrays of ``Packing`` in
one integer type, so that it can be mapped. The index repeats the numbers of all files: opening a stream of 60,000
pieces reads that and asks for the sizes of the files. A file is compared with its SHA-256 when this process first
touches it. What is missing, damaged or of another making is made again without a word; where nothing may be written, a
temporary folder takes the place of the given one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hybridlm.data.files.mapped import Mapped
from hybridlm.data.files.stream import TokenStream, opened
from hybridlm.data.windows.packing import Packing, document_starts, pack
from hybridlm.errors import UserError
from hybridlm.files.durable import replaced
from hybridlm.files.plain import open_regular, parse_json, read_json

FORMAT_VERSION = 2
_HEADER = 512  # bytes
_INDEX = "index.json"
_MAX_INDEX = 2**28  # bytes


class _Facts(NamedTuple):
    """Of a piece's packing: windows and pieces in them, pairs in these, bytes of an integer in its file."""

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
    """All windows of a stream, numbered piece after piece. It holds a few numbers per piece and can be sent to another
    process.

    len() is the number of windows; efficiency: the share of the columns that hold a pair.
    """

    def __init__(self, stream: TokenStream, seq_len: int, *, eos_id: int, folder: Path) -> None:
        """Packs what ``folder`` does not hold yet. eos_id: where documents end in files that do not say where they
        start.

        UserError: there is no document.
        """
        self.stream, self.seq_len, self._eos_id, self._folder = stream, seq_len, eos_id, folder
        self._sound: set[int] = set()  # pieces whose files have been compared with their hashes
        self._elsewhere: dict[
            int, Path
        ] = {}  # folders of the pieces whose files could not be written where they belong
        self._identity = object()  # a file may be made again between two packings over it
        facts = self._all_facts()
        self._facts = np.array(facts, dtype=np.int64)  # (pieces, 4)
        self.firsts = np.concatenate(
            [[0], np.cumsum(self._facts[:, 0])]
        )  # (pieces + 1,): each one's first window, and the end
        if not len(self):
            raise UserError("the text holds no document, so there is nothing to pack into windows of data.packing")
        self.efficiency = float(self._facts[:, 2].sum() / (len(self) * seq_len))

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def piece(self, number: int) -> Packing:
        """The packing of one piece of the stream, memory-mapped; its places are those in ``Arrays.closed``."""
        return opened((self._identity, number), lambda: self._open(number))

    def _open(self, number: int) -> tuple[Packing, Sequence[Mapped]]:
        facts = _Facts(*self._facts[number].tolist())
        if number not in self._sound:
            if not _is_sound(self._path(number), facts, self._key(number)):
                self._make(number)
            self._sound.add(number)
        file = Mapped(self._path(number))
        data = file.array(facts.dtype, _HEADER)
        windows = data[2 * facts.pieces : 2 * facts.pieces + facts.windows + 1]
        targets = data[2 * facts.pieces + facts.windows + 1 :]
        return Packing(data[: 2 * facts.pieces].reshape(-1, 2), windows, targets, self.seq_len), [file]

    def _all_facts(self) -> list[_Facts]:
        keys = [self._key(number) for number in range(len(self.stream.pieces))]
        index = _read_index(self._folder)
        known = {
            key: facts
            for key in keys
            if (facts := index.get(key)) and _size(self._folder / _name(key)) == facts.file_size
        }
        missing = [number for number, key in enumerate(keys) if key not in known]
        for number in missing:  # packed, but killed before the index was written; or not packed at all
            known[keys[number]] = _facts_of(self._path(number), keys[number]) or self._make(number)
        if missing:
            with contextlib.suppress(OSError):  # then every start reads the files' own headers
                _write_index(self._folder, {key: known[key] for key in keys})
        return [known[key] for key in keys]

    def _make(self, number: int) -> _Facts:
        """Packs a piece and writes its file."""
        this = self.stream.pieces[number]
        tokens, learned, starts = this.tokens(), this.learned(), this.starts()
        if starts is None:
            starts = document_starts(tokens, self._eos_id)
        if starts.size < 2:
            return _Facts(0, 0, 0, 4)
        packing = pack(starts, self.seq_len)
        if learned is not None:
            packing = packing.counting(learned)
        facts = _Facts(len(packing), len(packing.pieces), packing.pairs, 4 if int(starts[-1]) < 1 << 32 else 8)
        arrays = [array.astype(facts.dtype).reshape(-1) for array in (packing.pieces, packing.windows, packing.targets)]
        blocks = [_header(facts, self._key(number), arrays), *(array.tobytes() for array in arrays)]
        try:
            _write(self._path(number), blocks)
        except OSError:
            self._elsewhere[number] = _scratch()
            _write(self._path(number), blocks)
        return facts

    def _path(self, number: int) -> Path:
        return self._elsewhere.get(number, self._folder) / _name(self._key(number))

    def _key(self, number: int) -> str:
        """Hash of what the packing of a piece hangs on."""
        this = self.stream.pieces[number]
        eos = self._eos_id if this.documents is None else None
        made_of = [FORMAT_VERSION, this.key, this.offset, this.count, this.masked, self.seq_len, eos]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


def _name(key: str) -> str:
    return f"{key[:32]}.bin"


def _header(facts: _Facts, key: str, arrays: Iterable[np.ndarray]) -> bytes:
    digest = hashlib.sha256(json.dumps([*facts, key]).encode())
    for array in arrays:
        digest.update(array.data)
    line = json.dumps({"facts": facts, "key": key, "sha256": digest.hexdigest()})
    return line.encode().ljust(_HEADER - 1) + b"\n"


def _facts_of(path: Path, key: str) -> _Facts | None:
    """What a file's header says; None: there is no such file, or it is not what ``key`` names."""
    try:
        with open_regular(path) as file:
            content: Any = parse_json(file.read(_HEADER))
        facts = _Facts(*map(int, content["facts"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return facts if content["key"] == key and _size(path) == facts.file_size else None


def _is_sound(path: Path, facts: _Facts, key: str) -> bool:
    """Whether all of a file is as it was written."""
    if _facts_of(path, key) != facts:
        return False
    with path.open("rb") as file:
        return file.read(_HEADER) == _header(facts, key, [Mapped(path).array("u1", _HEADER)])


def _size(path: Path) -> int:
    """Bytes of a file; 0: there is none."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _read_index(folder: Path) -> dict[str, _Facts]:
    """Facts by key; empty where it is missing or damaged."""
    try:
        content: Any = read_json(folder / _INDEX, _MAX_INDEX)
        whole = content["sha256"] == _digest(content["files"])
        return {key: _Facts(*facts) for key, facts in content["files"].items()} if whole else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write_index(folder: Path, files: dict[str, _Facts]) -> None:
    _write(folder / _INDEX, [json.dumps({"sha256": _digest(files), "files": files}).encode()])


def _digest(files: dict[str, _Facts]) -> str:
    return hashlib.sha256(json.dumps([FORMAT_VERSION, files], sort_keys=True).encode()).hexdigest()


def _write(path: Path, blocks: Iterable[bytes]) -> None:
    """All of a file or nothing, whoever else writes it. OSError: it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as partial, partial.open("wb") as file:
        file.writelines(blocks)


def _scratch() -> Path:
    """This process's folder for what can be kept nowhere else, removed when it ends. UserError: it cannot be made."""
    return Path(_temporary().name)


@cache  # held for good: a worker process that was forked must not remove it when it drops what it inherited
def _temporary() -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="hybridlm-packed-")
    except OSError as error:
        raise UserError(f"packed windows can be written nowhere, not even for a while ({error})") from None
