"""Token files: a flat ``.bin`` of little-endian ids, and beside it

``.json``  what they are, written last: a ``.bin`` without one is unfinished; ``.idx``   where documents begin: one
uint32 per document, the place of the end-of-text before it, and the place of the last one; ``.mask``  only where not
every token is learned (conversations): a byte per token, 1 if it counts as a target.

The stream is ``[eos] doc [eos] doc ... [eos]``: every document has an end-of-text before it, so a model sees one before
it writes, and one closes the stream.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO, Literal

import numpy as np
from pydantic import ValidationError

from hybridlm.config.section import Section
from hybridlm.data.files.mapped import Mapped
from hybridlm.errors import UserError
from hybridlm.files.plain import Unreadable, parse_json, read_text

FORMAT_VERSION = 2
MAX_TOKENS = 1 << 31  # of one file, so that places in it fit uint32 and every sum of two does too
_REMEDY = "delete its folder and prepare again"


class BinMeta(Section):
    """The sidecar of a token file. text_bytes: of UTF-8 text, in conversations of the learned tokens' alone."""

    format_version: int
    dtype: Literal["<u2", "<u4"]
    count: int  # tokens, separators included
    documents: int
    vocab_size: int
    tokenizer: str  # Tokenizer.fingerprint
    text_bytes: int
    sha256: dict[str, str]  # of the .bin, the .idx and, where there is one, the .mask, by ending

    @property
    def masked(self) -> bool:
        return ".mask" in self.sha256


@dataclass(frozen=True)
class TokenFile:
    """A token file that was found to be whole. Its arrays are read-only, and mapped into memory when they are first
    asked for."""

    path: Path
    meta: BinMeta

    @cached_property
    def tokens(self) -> np.ndarray:
        """(count,) uint16 or uint32."""
        return Mapped(self.path).array(self.meta.dtype)

    @cached_property
    def starts(self) -> np.ndarray:
        """(documents + 1,) uint32: the places of the end-of-text before each document and of the closing one."""
        return Mapped(self.path.with_suffix(".idx")).array("<u4")

    @cached_property
    def learned(self) -> np.ndarray | None:
        """(count,) bool: which tokens count as targets; None: all do."""
        return Mapped(self.path.with_suffix(".mask")).array("?") if self.meta.masked else None


class BinWriter:
    """Writes one token file document by document; as a context it closes the file, and leaves it unfinished after an
    exception."""

    def __init__(self, path: Path, *, eos_id: int, vocab_size: int, tokenizer: str, masked: bool = False) -> None:
        """tokenizer: its fingerprint; masked: each document comes with what is learned of it. OSError: the file cannot
        be written."""
        self._path, self._vocab_size, self._tokenizer = path, vocab_size, tokenizer
        self._dtype: Literal["<u2", "<u4"] = "<u2" if vocab_size < 65536 else "<u4"
        self._eos = np.array([eos_id], dtype=self._dtype).tobytes()
        self._starts: list[int] = []
        self._text_bytes = 0
        self.count = 0
        self._bin = _Hashed(path)
        self._mask = _Hashed(path.with_suffix(".mask")) if masked else None

    def __enter__(self) -> BinWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._bin, self._mask):
            if file is not None:
                file.close()

    @property
    def documents(self) -> int:
        return len(self._starts)

    def add(self, ids: np.ndarray, text_bytes: int, learned: np.ndarray | None = None) -> None:
        """One document: ids (n,) of integers; learned (n,) bool, only if masked. ValueError: an id outside the
        vocabulary."""
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self._vocab_size:
            raise ValueError(f"document {self.documents} holds an id outside the vocabulary of {self._vocab_size}")
        self._starts.append(self.count)
        self._text_bytes += text_bytes
        self._bin.write(self._eos + ids.astype(self._dtype).tobytes())
        self.count += 1 + ids.size
        if self._mask is not None:
            assert learned is not None
            self._mask.write(b"\0" + learned.astype(np.bool_).tobytes())

    def finish(self) -> BinMeta:
        """Close the stream and write the files beside it."""
        self._starts.append(self.count)
        self._bin.write(self._eos)
        self.count += 1
        index = _Hashed(self._path.with_suffix(".idx"))
        index.write(np.array(self._starts, dtype="<u4").tobytes())
        hashes = {".bin": self._bin.finish(), ".idx": index.finish()}
        if self._mask is not None:
            self._mask.write(b"\0")
            hashes[".mask"] = self._mask.finish()
        meta = BinMeta(
            format_version=FORMAT_VERSION,
            dtype=self._dtype,
            count=self.count,
            documents=self.documents - 1,
            vocab_size=self._vocab_size,
            tokenizer=self._tokenizer,
            text_bytes=self._text_bytes,
            sha256=hashes,
        )
        self._path.with_suffix(".json").write_text(meta.model_dump_json(indent=1) + "\n", encoding="utf-8")
        return meta


def open_bin(path: str | Path, meta: BinMeta | None = None, *, verify: bool = True) -> TokenFile:
    """A token file, checked against its sidecar.

    meta: the sidecar's content where it is known already; verify: compare the hashes too, which reads all of it; sizes
    are compared anyway. ConfigError: a file is missing, damaged or of another format.
    """
    path = Path(path)
    meta = meta or _read_meta(path)
    sizes = {".bin": meta.count * np.dtype(meta.dtype).itemsize, ".idx": 4 * (meta.documents + 1), ".mask": meta.count}
    for ending in meta.sha256:
        _check(path.with_suffix(ending), sizes[ending], meta.sha256[ending] if verify else None)
    return TokenFile(path, meta)


class _Hashed:
    """A file being written, and the SHA-256 of what it holds."""

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] = path.open("wb", buffering=1 << 20)
        self._digest = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)

    def finish(self) -> str:
        self._file.flush()
        os.fsync(self._file.fileno())  # whoever finds the sidecar after a power cut finds this too
        self._file.close()
        return self._digest.hexdigest()

    def close(self) -> None:
        self._file.close()


def _check(path: Path, expected: int, sha256: str | None) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"token file {path} cannot be read ({error.strerror}); {_REMEDY}") from None
    if size != expected or not size:
        raise UserError(
            f"token file {path} has {size} bytes where {expected} are recorded: it is cut off or replaced; {_REMEDY}"
        )
    if sha256 is not None and sha256_of(path) != sha256:
        raise UserError(f"token file {path} is damaged (its SHA-256 is not the recorded one); {_REMEDY}")


def _read_meta(path: Path) -> BinMeta:
    sidecar = path.with_suffix(".json")
    try:
        content = read_text(sidecar)
        meta = BinMeta.model_validate_json(content)
    except Unreadable as error:
        raise UserError(f"token file {path} has no readable sidecar {sidecar.name} ({error}); {_REMEDY}") from None
    except ValidationError as error:
        if (version := _version(content)) not in (None, FORMAT_VERSION):
            raise UserError(
                f"token file {path} has format {version}, this version reads {FORMAT_VERSION}; {_REMEDY}"
            ) from None
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UserError(f"sidecar {sidecar} is damaged: {where}: {first['msg']}; {_REMEDY}") from None
    if meta.format_version != FORMAT_VERSION:
        raise UserError(
            f"token file {path} has format {meta.format_version}, this version reads {FORMAT_VERSION}; {_REMEDY}"
        )
    if not {".bin", ".idx"} <= meta.sha256.keys() <= {".bin", ".idx", ".mask"} or meta.count < meta.documents + 1:
        raise UserError(f"sidecar {sidecar} is damaged: its counts or the files it names are impossible; {_REMEDY}")
    return meta


def _version(content: str) -> object:
    """The format that a sidecar names, whatever else it holds."""
    try:
        facts = parse_json(content)
    except Unreadable:
        return None
    return facts.get("format_version") if isinstance(facts, dict) else None


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
