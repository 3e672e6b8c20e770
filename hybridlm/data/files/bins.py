"""Token files: a flat ``.bin`` of little-endian ids, and next to it

``.json``  metadata, written last: a ``.bin`` without it is incomplete;
``.idx``   where documents begin: one uint32 per document, the position of the end-of-text token before it, and the
           position of the last end-of-text;
``.mask``  only where not every token is learned (conversations): one byte per token, 1 if it counts as a target.

The stream is ``[eos] doc [eos] doc ... [eos]``: every document has an end-of-text before it, so a model sees one before
it writes, and one closes the stream.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from hybridlm.config.problems import recorded
from hybridlm.config.section import Section
from hybridlm.data.files.stream import Piece
from hybridlm.errors import UserError
from hybridlm.files.plain import Unreadable, read_json

FORMAT_VERSION = 2
MAX_TOKENS = 1 << 31  # per file, so that positions in it fit uint32, and so does every sum of two
_REMEDY = "delete its folder and prepare again"


class BinMeta(Section):
    """The sidecar of a token file. text_bytes: UTF-8 bytes of text, in conversations of the learned tokens only."""

    format_version: Literal[2]
    dtype: Literal["<u2", "<u4"]
    count: int  # tokens, separators included
    documents: int
    vocab_size: int
    tokenizer: str  # Tokenizer.fingerprint
    text_bytes: int
    sha256: dict[str, str]  # of the .bin, the .idx and the .mask if there is one, by extension

    @property
    def masked(self) -> bool:
        return ".mask" in self.sha256


class BinWriter(contextlib.ExitStack):
    """Writes one token file document by document. As a context manager it closes the file, and leaves it incomplete
    after an exception."""

    def __init__(self, path: Path, *, eos_id: int, vocab_size: int, tokenizer: str, masked: bool = False) -> None:
        """tokenizer: its fingerprint; masked: each document comes with a mask of learned tokens. OSError: the file
        cannot be written."""
        super().__init__()
        self._path, self._vocab_size, self._tokenizer = path, vocab_size, tokenizer
        self._dtype: Literal["<u2", "<u4"] = "<u2" if vocab_size < 65536 else "<u4"
        self._eos = np.array([eos_id], dtype=self._dtype).tobytes()
        self._starts: list[int] = []
        self.text_bytes = 0
        self.count = 0
        self._bin = self._opened(".bin")
        self._mask = self._opened(".mask") if masked else None

    def add(self, ids: np.ndarray, text_bytes: int, learned: np.ndarray | None = None) -> None:
        """One document: ids (n,) of integers; learned (n,) bool, only if masked. ValueError: an id outside the
        vocabulary."""
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self._vocab_size:
            raise ValueError(f"document {len(self._starts)} has an id outside the vocabulary of {self._vocab_size}")
        self._starts.append(self.count)
        self.text_bytes += text_bytes
        self._bin.write(self._eos + ids.astype(self._dtype).tobytes())
        self.count += 1 + ids.size
        if self._mask is not None and learned is not None:
            self._mask.write(b"\0" + learned.astype(np.bool_).tobytes())

    def finish(self) -> BinMeta:
        """Close the stream and write the files next to it."""
        self._bin.write(self._eos)
        files = {".bin": self._bin, ".idx": self._opened(".idx")}
        files[".idx"].write(np.array([*self._starts, self.count], dtype="<u4").tobytes())
        if self._mask is not None:
            files[".mask"] = self._mask
            self._mask.write(b"\0")
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())  # whoever finds the sidecar after a power cut finds these too
        self.close()
        meta = BinMeta(
            format_version=2,
            dtype=self._dtype,
            count=self.count + 1,
            documents=len(self._starts),
            vocab_size=self._vocab_size,
            tokenizer=self._tokenizer,
            text_bytes=self.text_bytes,
            sha256={ending: _sha256_of(self._path.with_suffix(ending)) for ending in files},
        )
        self._path.with_suffix(".json").write_text(meta.model_dump_json(indent=1) + "\n", encoding="utf-8")
        return meta

    def _opened(self, ending: str) -> IO[bytes]:
        return self.enter_context(self._path.with_suffix(ending).open("wb", buffering=1 << 20))


def open_bin(path: Path, meta: BinMeta, *, verify: bool = True) -> Piece:
    """The whole of a token file, checked against its sidecar ``meta`` (see ``read_meta``).

    verify: compare the hashes too, which reads all of it; sizes are always compared. UserError: a file is missing or
    damaged.
    """
    sizes = {".bin": meta.count * np.dtype(meta.dtype).itemsize, ".idx": 4 * (meta.documents + 1), ".mask": meta.count}
    for ending in meta.sha256:
        _check(path.with_suffix(ending), sizes[ending], meta.sha256[ending] if verify else None)
    key = hashlib.sha256(json.dumps(meta.sha256, sort_keys=True).encode()).hexdigest()
    return Piece(path, meta.dtype, meta.count, masked=meta.masked, documents=meta.documents, key=key)


def _check(path: Path, expected: int, sha256: str | None) -> None:
    try:
        size = path.stat().st_size
        damaged = sha256 is not None and size == expected and _sha256_of(path) != sha256
    except OSError as error:
        raise UserError(f"token file {path} cannot be read ({error.strerror}); {_REMEDY}") from None
    if size != expected or not size:
        raise UserError(
            f"token file {path} has {size} bytes, but {expected} are recorded: it is truncated or replaced; {_REMEDY}"
        )
    if damaged:
        raise UserError(f"token file {path} is damaged (its SHA-256 differs from the recorded one); {_REMEDY}")


def read_meta(path: Path) -> BinMeta:
    """The sidecar of the token file ``path``. UserError: it is missing, damaged or of another format version."""
    sidecar = path.with_suffix(".json")
    try:
        facts: Any = read_json(sidecar)
    except Unreadable as error:
        raise UserError(f"token file {path} has no readable sidecar {sidecar.name} ({error}); {_REMEDY}") from None
    meta = recorded(BinMeta, facts, f"sidecar {sidecar} is damaged or of another version ({_REMEDY})")
    if not {".bin", ".idx"} <= meta.sha256.keys() <= {".bin", ".idx", ".mask"} or meta.count < meta.documents + 1:
        raise UserError(f"sidecar {sidecar} is damaged: its counts or the files it names are impossible; {_REMEDY}")
    return meta


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
