"""Token files written by other programs, for training on text that is already tokenised.

Three kinds, recognised in this order: a ``.bin`` with our sidecar next to it; llm.c's, by the magic number in its first
four bytes; and a headerless array of little-endian ids (nanoGPT writes u16), whose width is not in the file:
``data.dtype`` gives it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from hybridlm.data.files.bins import open_bin, read_meta
from hybridlm.data.files.stream import Mapped, Piece
from hybridlm.errors import ConfigError, UserError
from hybridlm.files.plain import Unreadable, open_regular

Dtype = Literal["u16", "u32"]

_BLOCK = 1 << 22  # tokens
_HEADER_BYTES = 1024  # 256 little-endian int32: magic, version, number of tokens, then zeros
_SIDECAR_BYTES = 4096  # ours is smaller
_WIDTHS: dict[Dtype, int] = {"u16": 2, "u32": 4}  # bytes
_IMPLAUSIBLE = 1 << 31  # no vocabulary is as large: an id from here on is two u16 in one


class _Header(NamedTuple):
    tokenizer: str
    version: int
    dtype: Dtype


_LLM_C = {20240520: _Header("GPT-2", 1, "u16"), 20240801: _Header("Llama-3", 7, "u32")}  # by magic


def open_foreign(
    path: Path, *, dtype: Dtype | None, vocab_size: int | None, tokenizer: str | None = None, scan: bool = True
) -> Piece:
    """The whole of a token file of any of the three kinds. dtype: ``data.dtype``, which only a headerless file needs.

    vocab_size: check every id against it; tokenizer: the fingerprint that a file of ours must have. scan: look at all
    ids, and at the hashes of a file of ours; False: at sizes and headers only.

    UserError, one line: the file cannot be read, is empty, truncated or of an unknown version, ``dtype`` is missing or
    contradicts the file, an id is outside the vocabulary, or the tokenizer is another one.
    """
    head, size = _peek(path)
    if _has_sidecar(path):
        meta = read_meta(path)
        if tokenizer not in (None, meta.tokenizer):
            raise UserError(f"token file {path} was made by a different tokenizer than that of data.tokenizer.path")
        _check_dtype(path, dtype, "u16" if meta.dtype == "<u2" else "u32", "its sidecar")
        piece = open_bin(path, meta, verify=scan)
    elif not size:
        raise UserError(f"token file {path} is empty: 0 bytes; at least one token is needed")
    # A headerless file whose first four bytes happen to be a magic is taken as headed: one in two billion of those with
    # random ids.
    elif _int32(head, 0) in _LLM_C:
        piece = _open_llm_c(path, head, size, dtype)
    else:
        piece = _open_raw(path, head, size, dtype)
        if scan:
            _check_raw(piece, dtype, vocab_size)
        return piece
    if scan and vocab_size is not None and (position := _first_outside(piece.tokens(), vocab_size)) is not None:
        raise UserError(_outside(piece, position, vocab_size))
    return piece


def _first_outside(tokens: np.ndarray, limit: int) -> int | None:
    """Position of the first id >= ``limit``; memory is bounded however many there are."""
    if limit > np.iinfo(tokens.dtype).max:
        return None
    for start in range(0, tokens.size, _BLOCK):
        block = tokens[start : start + _BLOCK]
        if int(block.max()) >= limit:  # a maximum needs no memory; the search, which does, runs once
            return start + int(np.argmax(block >= limit))
    return None


def _outside(piece: Piece, position: int, vocab_size: int | None) -> str:
    byte = piece.offset + position * np.dtype(piece.dtype).itemsize
    found = f"token file {piece.path}: id {int(piece.tokens()[position])} at token {position} (byte {byte})"
    if vocab_size is None:
        return f"{found} is implausible: expected 0 to {_IMPLAUSIBLE - 1}"
    return f"{found} is outside the vocabulary of {vocab_size}: expected 0 to {vocab_size - 1}"


def _peek(path: Path) -> tuple[bytes, int]:
    """The bytes where a header would be, and the size of the file in bytes."""
    try:
        with open_regular(path) as file:
            return file.read(_HEADER_BYTES), file.seek(0, 2)
    except Unreadable as error:
        raise UserError(f"token file {path}: {error}") from None


def _int32(head: bytes, index: int) -> int:
    """Header field ``index``. Of a shorter file fewer than four bytes may be left: such a number is smaller than any
    magic."""
    return int.from_bytes(head[4 * index : 4 * index + 4], "little", signed=True)


def _has_sidecar(path: Path) -> bool:
    """Whether the ``.json`` next to the file is ours: another program's may have nothing to do with the tokens."""
    sidecar = path.with_suffix(".json")
    try:
        with open_regular(sidecar) as file:
            return sidecar != path and b'"format_version"' in file.read(_SIDECAR_BYTES)
    except (OSError, Unreadable):
        return False


def _check_dtype(path: Path, dtype: Dtype | None, actual: Dtype, source: str) -> None:
    if dtype not in (None, actual):
        raise ConfigError(
            f"data.dtype is {dtype}, but by {source} token file {path} holds {actual}: omit it or set {actual}"
        )


def _open_llm_c(path: Path, head: bytes, size: int, dtype: Dtype | None) -> Piece:
    magic = _int32(head, 0)
    tokenizer, expected_version, actual = _LLM_C[magic]
    name = f"token file {path} (llm.c, {tokenizer} magic {magic})"
    if size < _HEADER_BYTES:
        raise UserError(f"{name} is truncated in its header: it has {size} bytes, the header alone has {_HEADER_BYTES}")
    version, count = _int32(head, 1), _int32(head, 2)
    if version != expected_version:
        raise UserError(f"{name} has version {version} at byte 4; expected {expected_version}")
    if count * _WIDTHS[actual] != size - _HEADER_BYTES:
        raise UserError(
            f"{name} has the token count {count} at byte 8, but {size - _HEADER_BYTES} bytes after its header, at"
            f" {_WIDTHS[actual]} per token: it is truncated or replaced"
        )
    if not count:
        raise UserError(f"{name} is empty: 0 tokens after its header; at least one is needed")
    _check_dtype(path, dtype, actual, f"the magic {magic} (llm.c, {tokenizer})")
    return Piece(path, f"<u{_WIDTHS[actual]}", count, offset=_HEADER_BYTES)


def _open_raw(path: Path, head: bytes, size: int, dtype: Dtype | None) -> Piece:
    """A header of an unknown magic, or a damaged one, would be trained on as 256 or 512 tokens, so it is refused."""
    counted = size > _HEADER_BYTES and _int32(head, 2) * 4 in ((size - _HEADER_BYTES) * 2, size - _HEADER_BYTES)
    if counted and not any(head[12:]):
        legal = " or ".join(f"{magic} ({header.tokenizer})" for magic, header in _LLM_C.items())
        raise UserError(
            f"token file {path} has a header like llm.c's, but the magic {_int32(head, 0)} at byte 0; expected {legal}"
        )
    fitting = [f"{name} ({size // width} tokens)" for name, width in _WIDTHS.items() if size % width == 0]
    fits = f"its {size} bytes fit {' and '.join(fitting) or 'neither u16 nor u32, being an odd number'}"
    if dtype is None:
        raise UserError(f"token file {path} has no header and no sidecar, so data.dtype must be u16 or u32: {fits}")
    if size % _WIDTHS[dtype]:
        raise UserError(
            f"token file {path} is not a multiple of {_WIDTHS[dtype]} bytes, as data.dtype {dtype} requires: {fits}"
        )
    return Piece(path, f"<u{_WIDTHS[dtype]}", size // _WIDTHS[dtype])


def _check_raw(piece: Piece, dtype: Dtype | None, vocab_size: int | None) -> None:
    """Refuse impossible ids, and a width that cannot be right."""
    # The upper half of an id, were all of them u32; an unknown vocabulary is assumed to fit u16.
    highest = 0 if vocab_size is None else (vocab_size - 1) >> 16
    high_words = Mapped(piece.path).array("<u2")[1::2]
    tokens = piece.tokens()
    if dtype == "u16" and tokens.size % 2 == 0 and _first_outside(high_words, highest + 1) is None:
        small = "zero" if not highest else f"at most {highest}"
        raise UserError(
            f"token file {piece.path} looks like u32, not u16: every second 16-bit word is {small}; set data.dtype to"
            " u32"
        )
    position = _first_outside(tokens, _IMPLAUSIBLE if vocab_size is None else vocab_size)
    if position is not None:
        # One bad id is damage; where most are bad, and by their upper half, the width is wrong.
        mixed_up = dtype == "u32" and np.count_nonzero(high_words[:_BLOCK] > highest) * 2 > high_words[:_BLOCK].size
        hint = "; the file looks like u16: set data.dtype to u16" if mixed_up else ""
        raise UserError(_outside(piece, position, vocab_size) + hint)
