"""Token files: a flat ``.bin`` of little-endian ids and a ``.json`` beside it that says what they are.

The stream is ``[eos] doc [eos] doc ... [eos]``: every document has an end-of-text before it, so a model sees one before it writes, and one
closes the stream.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import ValidationError

from hybridlm.config.section import ConfigError, Section

FORMAT_VERSION = 1
_HASH_BLOCK = 1 << 22  # bytes
_REMEDY = "delete its folder and prepare again"


class BinMeta(Section):
    """The sidecar of a token file. Sizes are in bytes of UTF-8 text; the two compressed ones are those of all documents joined."""

    format_version: int
    dtype: Literal["<u2", "<u4"]
    count: int  # tokens, separators included
    documents: int
    vocab_size: int
    tokenizer: str  # Tokenizer.fingerprint
    sha256: str  # of the .bin
    text_bytes: int
    gzip_bytes: int | None = None
    xz_bytes: int | None = None


@dataclass(frozen=True)
class TokenFile:
    """An opened token file: ``tokens`` (count,) uint16 or uint32, memory-mapped and read-only."""

    path: Path
    tokens: np.ndarray
    meta: BinMeta


def write_bin(
    path: str | Path,
    documents: Iterable[np.ndarray],
    *,
    eos_id: int,
    vocab_size: int,
    tokenizer: str,
    text_bytes: int,
    gzip_bytes: int | None = None,
    xz_bytes: int | None = None,
) -> BinMeta:
    """Write ``documents`` (1-D arrays of ids) one after the other; ``tokenizer`` is the fingerprint.

    The sidecar comes last: a ``.bin`` without one is unfinished and is not opened. ValueError: an id outside the vocabulary.
    """
    path = Path(path)
    dtype: Literal["<u2", "<u4"] = "<u2" if vocab_size < 65536 else "<u4"
    digest = hashlib.sha256()
    count = number = 0
    with path.open("wb") as file:
        for ids in _framed(documents, eos_id):
            if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
                raise ValueError(f"document {number} holds an id outside the vocabulary of {vocab_size}")
            data = ids.astype(dtype).tobytes()
            file.write(data)
            digest.update(data)
            count += ids.size
            number += 1
    meta = BinMeta(
        format_version=FORMAT_VERSION,
        dtype=dtype,
        count=count,
        documents=number - 1,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        sha256=digest.hexdigest(),
        text_bytes=text_bytes,
        gzip_bytes=gzip_bytes,
        xz_bytes=xz_bytes,
    )
    _sidecar(path).write_text(meta.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return meta


def open_bin(path: str | Path) -> TokenFile:
    """Map a token file after checking it against its sidecar, hash included.

    ConfigError: either is missing, damaged or of another format.
    """
    path = Path(path)
    meta = _read_meta(path)
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ConfigError(f"token file {path} cannot be read ({error.strerror}); {_REMEDY}") from None
    expected = meta.count * np.dtype(meta.dtype).itemsize
    if size != expected or not size:
        raise ConfigError(f"token file {path} has {size} bytes where {expected} are recorded: it is cut off or replaced; {_REMEDY}")
    if _sha256(path) != meta.sha256:
        raise ConfigError(f"token file {path} is damaged (its SHA-256 is not the recorded one); {_REMEDY}")
    return TokenFile(path, np.memmap(path, dtype=meta.dtype, mode="r"), meta)


def _framed(documents: Iterable[np.ndarray], eos_id: int) -> Iterator[np.ndarray]:
    eos = np.array([eos_id], dtype=np.int64)
    for ids in documents:
        yield np.concatenate([eos, ids])
    yield eos


def _sidecar(path: Path) -> Path:
    return path.with_suffix(".json")


def _read_meta(path: Path) -> BinMeta:
    sidecar = _sidecar(path)
    try:
        meta = BinMeta.model_validate_json(sidecar.read_bytes())
    except OSError as error:
        raise ConfigError(f"token file {path} has no readable sidecar {sidecar.name} ({error.strerror}); {_REMEDY}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ConfigError(f"sidecar {sidecar} is damaged: {where}: {first['msg']}; {_REMEDY}") from None
    if meta.format_version != FORMAT_VERSION:
        raise ConfigError(f"token file {path} has format {meta.format_version}, this version reads {FORMAT_VERSION}; {_REMEDY}")
    return meta


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()
