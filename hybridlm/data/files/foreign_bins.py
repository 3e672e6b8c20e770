"""Token files that other programs wrote, for training on text that is already tokenised.

Three kinds, told apart in this order: a ``.bin`` with our sidecar beside it; llm.c's, by the magic number in its first
four bytes; and a headerless array of little-endian ids (nanoGPT writes u16), whose width nothing in the file says:
``data.dtype`` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from hybridlm.data.files.bins import BinMeta, open_bin
from hybridlm.data.files.mapped import Mapped
from hybridlm.errors import ConfigError, UserError
from hybridlm.files.plain import Unreadable, open_regular

Dtype = Literal["u16", "u32"]

_BLOCK = 1 << 22  # tokens
_HEADER_BYTES = 1024  # 256 little-endian int32: magic, version, number of tokens, then zeros
_SIDECAR_BYTES = 4096  # ours is smaller
_WIDTHS: dict[Dtype, int] = {"u16": 2, "u32": 4}  # bytes
_IMPLAUSIBLE = 1 << 31  # no vocabulary is as large: an id from here on is two u16 in one


@dataclass(frozen=True)
class ForeignFile:
    """An opened token file: ``tokens`` (N,) uint16 or uint32, memory-mapped and read-only, N >= 1, header skipped.

    ``form`` is the layout of the file, and ``own`` what our sidecar says, if it has one.
    """

    path: Path
    tokens: np.ndarray
    form: Literal["own", "raw", "llm.c"]
    own: BinMeta | None = None

    @property
    def offset(self) -> int:
        """Bytes before the first token."""
        return _HEADER_BYTES if self.form == "llm.c" else 0


@dataclass(frozen=True)
class _Header:
    tokenizer: str
    version: int
    dtype: Dtype


_LLM_C = {20240520: _Header("GPT-2", 1, "u16"), 20240801: _Header("Llama-3", 7, "u32")}  # by magic


def open_foreign(path: str | Path, *, dtype: Dtype | None, vocab_size: int | None, scan: bool = True) -> ForeignFile:
    """Map a token file of any of the three kinds; ``dtype`` is ``data.dtype``, which only a headerless file needs.

    With ``vocab_size``, every id is checked against it. scan: look at all ids, and at the hashes of a file of ours;
    False: at sizes and headers alone. ConfigError, one line: the file cannot be read, is empty, cut off or of an
    unknown version, ``dtype`` is missing or contradicts the file, or an id is outside the vocabulary.
    """
    path = Path(path)
    head, size = _peek(path)
    if _has_sidecar(path):
        own = open_bin(path, verify=scan)
        _check_dtype(path, dtype, "u16" if own.meta.dtype == "<u2" else "u32", "its sidecar")
        opened = ForeignFile(path, own.tokens, "own", own.meta)
    elif not size:
        raise UserError(f"token file {path} is empty: 0 bytes where at least one token is needed")
    # A headerless file whose first four bytes happen to be a magic is taken as headed: one in two billion of those with
    # random ids.
    elif _int32(head, 0) in _LLM_C:
        opened = ForeignFile(path, _open_llm_c(path, head, size, dtype), "llm.c")
    else:
        opened = ForeignFile(path, _open_raw(path, head, size, dtype), "raw")
        if scan:
            _check_raw(opened.tokens, size, dtype, vocab_size, path)
    if scan and vocab_size is not None and opened.form != "raw":
        check_ids(opened.tokens, vocab_size, path, offset_bytes=opened.offset)
    return opened


def check_ids(tokens: np.ndarray, vocab_size: int, path: Path, *, offset_bytes: int = 0) -> None:
    """Refuse the first of ``tokens`` (N,) uint16 or uint32 that is not below ``vocab_size``; memory stays bounded
    however large N.

    ``offset_bytes`` is where the tokens start in the file ``path``. ConfigError: the id, its token position and its
    byte.
    """
    position = _first_outside(tokens, vocab_size)
    if position is not None:
        raise UserError(_outside(tokens, position, vocab_size, path, offset_bytes))


def _first_outside(tokens: np.ndarray, limit: int) -> int | None:
    """Position of the first id >= ``limit``."""
    if limit > np.iinfo(tokens.dtype).max:
        return None
    for start in range(0, tokens.size, _BLOCK):
        block = tokens[start : start + _BLOCK]
        if int(block.max()) >= limit:  # a maximum needs no memory; the search, which does, runs once
            return start + int(np.argmax(block >= limit))
    return None


def _outside(tokens: np.ndarray, position: int, vocab_size: int | None, path: Path, offset_bytes: int) -> str:
    byte = offset_bytes + position * tokens.itemsize
    found = f"token file {path}: id {int(tokens[position])} at token {position} (byte {byte})"
    if vocab_size is None:
        return f"{found} is implausible: legal are 0 to {_IMPLAUSIBLE - 1}"
    return f"{found} is outside the vocabulary of {vocab_size}: legal are 0 to {vocab_size - 1}"


def _peek(path: Path) -> tuple[bytes, int]:
    """What a header would take of the file, or all of a shorter one, and its size in bytes."""
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise UserError(f"token file {path} is not a regular file; legal is the path of one file of tokens")
        with path.open("rb") as file:
            return file.read(_HEADER_BYTES), size
    except OSError as error:
        raise UserError(
            f"token file {path} cannot be read ({error.strerror}); legal is the path of one file of tokens"
        ) from None


def _int32(head: bytes, index: int) -> int:
    """Header field ``index``. Of a shorter file less than four bytes may be left: such a number is smaller than any
    magic."""
    return int.from_bytes(head[4 * index : 4 * index + 4], "little", signed=True)


def _has_sidecar(path: Path) -> bool:
    """Whether the ``.json`` beside the file is ours: another program's (the text, say) has no business with the
    tokens."""
    sidecar = path.with_suffix(".json")
    try:
        with open_regular(sidecar) as file:
            return sidecar != path and b'"format_version"' in file.read(_SIDECAR_BYTES)
    except (OSError, Unreadable):
        return False


def _check_dtype(path: Path, dtype: Dtype | None, actual: Dtype, source: str) -> None:
    if dtype not in (None, actual):
        raise ConfigError(
            f"data.dtype is {dtype}, but {source} says that token file {path} holds {actual}: leave it out or set"
            f" {actual}"
        )


def _open_llm_c(path: Path, head: bytes, size: int, dtype: Dtype | None) -> np.ndarray:
    magic = _int32(head, 0)
    expected = _LLM_C[magic]
    name = f"token file {path} (llm.c, {expected.tokenizer} magic {magic})"
    if size < _HEADER_BYTES:
        raise UserError(
            f"{name} is cut off in its header: it has {size} bytes where the header alone takes {_HEADER_BYTES}"
        )
    version, count = _int32(head, 1), _int32(head, 2)
    if version != expected.version:
        raise UserError(f"{name} has version {version} at byte 4: legal is {expected.version}")
    width = _WIDTHS[expected.dtype]
    if count * width != size - _HEADER_BYTES:
        raise UserError(
            f"{name} has the token count {count} at byte 8, but {size - _HEADER_BYTES} bytes after its header where"
            f" {width} a token are legal: it is cut off or replaced"
        )
    if not count:
        raise UserError(f"{name} is empty: 0 tokens after its header where at least one is needed")
    _check_dtype(path, dtype, expected.dtype, f"the magic {magic} (llm.c, {expected.tokenizer})")
    return _map(path, expected.dtype, _HEADER_BYTES)


def _open_raw(path: Path, head: bytes, size: int, dtype: Dtype | None) -> np.ndarray:
    _refuse_unknown_header(path, head, size)
    fitting = [f"{name} ({size // width} tokens)" for name, width in _WIDTHS.items() if size % width == 0]
    fits = f"its {size} bytes fit {' and '.join(fitting) or 'neither u16 nor u32: they are odd in number'}"
    if dtype is None:
        raise UserError(f"token file {path} has no header and no sidecar, so data.dtype must say u16 or u32: {fits}")
    if size % _WIDTHS[dtype]:
        raise UserError(
            f"token file {path} is not a multiple of {_WIDTHS[dtype]} bytes, as data.dtype {dtype} asks: {fits}"
        )
    return _map(path, dtype, 0)


def _check_raw(tokens: np.ndarray, size: int, dtype: Dtype | None, vocab_size: int | None, path: Path) -> None:
    """Refuse ids that cannot be, and a width that cannot be right."""
    # The larger half of an id, were all of them u32; a vocabulary that is not known is taken to fit u16.
    highest = 0 if vocab_size is None else (vocab_size - 1) >> 16
    high_words = tokens.view("<u2")[1::2]
    if dtype == "u16" and size % 4 == 0 and _first_outside(high_words, highest + 1) is None:
        small = "zero" if not highest else f"at most {highest}"
        raise UserError(
            f"token file {path} looks like u32, not u16: every second 16-bit word is {small}; set data.dtype to u32"
        )
    position = _first_outside(tokens, _IMPLAUSIBLE if vocab_size is None else vocab_size)
    if position is not None:
        # One bad id is damage; where most are bad, and so by their upper half, the width is wrong.
        mixed_up = dtype == "u32" and np.count_nonzero(high_words[:_BLOCK] > highest) * 2 > high_words[:_BLOCK].size
        hint = "; the file looks like u16: set data.dtype to u16" if mixed_up else ""
        raise UserError(_outside(tokens, position, vocab_size, path, 0) + hint)


def _refuse_unknown_header(path: Path, head: bytes, size: int) -> None:
    """A header of a magic we do not know, or a damaged one, would be trained on as 256 or 512 tokens."""
    counted = size > _HEADER_BYTES and _int32(head, 2) * 4 in ((size - _HEADER_BYTES) * 2, size - _HEADER_BYTES)
    if counted and not any(head[12:]):
        legal = " or ".join(f"{magic} ({header.tokenizer})" for magic, header in _LLM_C.items())
        raise UserError(
            f"token file {path} has a header like llm.c's, but the magic {_int32(head, 0)} at byte 0: legal is {legal}"
        )


def _map(path: Path, dtype: Dtype, offset_bytes: int) -> np.ndarray:
    return Mapped(path).array(f"<u{_WIDTHS[dtype]}", offset_bytes)
