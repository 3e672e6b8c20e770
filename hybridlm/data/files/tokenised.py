"""``data.source=bins``: a corpus that is already tokenised. Its token files are read in place, and scanned once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from hybridlm.config.data import DataConfig
from hybridlm.data.corpus import Part, Prepared, TextSplit
from hybridlm.data.files.foreign_bins import open_foreign
from hybridlm.data.files.stream import Piece, TokenStream, joined
from hybridlm.data.keep import cache_name, keep_json, kept_json
from hybridlm.data.reading.paths import find_files, shown
from hybridlm.data.tokenizer import Tokenizer, load_tokenizer
from hybridlm.errors import ConfigError
from hybridlm.files.home import expanded

_BLOCK = 1 << 22  # tokens
_ENDINGS = (".bin",)  # of the files of a folder


def open_tokenised(
    config: DataConfig, data_folder: Callable[[], Path], report: Callable[[str], None], whole: bool
) -> Prepared:
    """data_folder: for scan results; whole: without ``data.val_path`` both splits are all of ``data.path``.

    UserError: a file or the tokenizer is missing or does not fit.
    """
    assert config.path is not None  # config.data_constraints
    assert config.tokenizer.path is not None
    folder = data_folder()
    tokenizer = load_tokenizer(expanded(config.tokenizer.path), config.tokenizer.special_tokens)
    found = find_files("data.path", config.path, _ENDINGS)
    named = None if config.val_path is None else find_files("data.val_path", config.val_path, _ENDINGS)
    if named is not None:
        found = found.without(named)
    scans = _Scans(folder, f"{found.place}\0{'' if named is None else named.place}", config, tokenizer)
    train = joined(scans.piece(path) for path in found.files.values())
    count, more = sum(piece.size for piece in train), 0
    if named is not None:
        val = joined(scans.piece(path) for path in named.files.values())
        more = sum(piece.size for piece in val)
        held = f"{more:,} tokens of {named.shown}"
    elif whole:
        val, held = train, "none"
    else:
        held_out = max(1, round(count * config.val_fraction))
        if min(held_out, count - held_out) < 2:
            raise ConfigError(
                f"data.path={shown(config.path)}: {count:,} tokens are too few to train on and to hold some out"
            )
        train, val = _cut(train, count - held_out, config.path)
        held = f"the last {held_out:,}"
    splits = [scans.described(pieces) for pieces in (train, val)]
    scans.keep()
    name = hashlib.sha256("".join(piece.key for split in splits for piece in split.stream.pieces).encode()).hexdigest()
    files = f"{len(found.files)} files of " if len(found.files) > 1 else ""
    report(f"bins: {count + more:,} tokens in {files}{found.shown}; held out for validation: {held}")
    return Prepared((Part("bins", 1.0, splits[0], splits[1], folder / f"bins-{name[:12]}"),), tokenizer)


def _cut(pieces: Sequence[Piece], at: int, path: str | tuple[str, ...]) -> tuple[list[Piece], list[Piece]]:
    """``pieces`` before and after token ``at`` of their stream."""
    if any(piece.masked for piece in pieces):
        raise ConfigError(
            f"data.path={shown(path)} holds conversations, which are not cut: name others to validate on with"
            " data.val_path"
        )
    before: list[Piece] = []
    after: list[Piece] = []
    for piece in pieces:
        if piece.size <= at:
            before.append(piece)
        elif at <= 0:
            after.append(piece)
        else:
            # Positions of documents are those of the whole file.
            before.append(replace(piece, count=at, documents=None, open_end=False))
            skipped = piece.offset + at * np.dtype(piece.dtype).itemsize
            after.append(replace(piece, offset=skipped, count=piece.count - at, documents=None))
        at -= piece.size
    return before, after


class _Scans:
    """What was found in each file and in each stretch of one; valid while the file keeps its size and time."""

    def __init__(self, folder: Path, place: str, config: DataConfig, tokenizer: Tokenizer) -> None:
        self._path = folder / "scans" / f"{cache_name(place, config.dtype, tokenizer.fingerprint)}.json"
        self._old, self._new = kept_json(self._path), dict[str, list[object]]()
        self._dtype, self._tokenizer = config.dtype, tokenizer
        self._sizes = tokenizer.token_bytes().astype(np.int64)

    def piece(self, path: Path) -> Piece:
        """A whole file, its ids checked if they were not before."""
        stamp = _stamp(path)
        piece = open_foreign(
            path,
            dtype=self._dtype,
            vocab_size=self._tokenizer.vocab_size,
            tokenizer=self._tokenizer.fingerprint,
            scan=self._old.get(str(path)) != stamp,
        )
        self._new[str(path)] = stamp
        return piece

    def described(self, pieces: Sequence[Piece]) -> TextSplit:
        """The stream of ``pieces``, their contents counted if they were not before."""
        keys, documents, text_bytes = zip(*map(self._facts, pieces), strict=True)
        named = [replace(piece, key=key) for piece, key in zip(pieces, keys, strict=True)]
        return TextSplit(TokenStream(named), sum(documents), sum(text_bytes))

    def keep(self) -> None:
        if self._new != self._old:
            keep_json(self._path, self._new)

    def _facts(self, piece: Piece) -> tuple[str, int, int]:
        """Key, documents and bytes of text (of what is learned) of a piece."""
        name, stamp = f"{piece.path}:{piece.offset}+{piece.size}", _stamp(piece.path)
        old = self._old.get(name, [None])
        key, documents, text_bytes = old[1:] if old[0] == stamp else self._counted(piece)
        self._new[name] = [stamp, key, documents, text_bytes]
        return key, documents, text_bytes

    def _counted(self, piece: Piece) -> tuple[str, int, int]:
        digest = hashlib.sha256(f"{piece.documents}/{piece.masked}".encode())
        tokens, learned = piece.tokens(), piece.learned()
        documents = text_bytes = 0
        for first in range(0, piece.size, _BLOCK):
            block = tokens[first : min(first + _BLOCK, piece.size)]
            mask = np.ones(0, bool) if learned is None else learned[first : first + block.size]
            digest.update(block.tobytes() + mask.tobytes())
            documents += int((block == self._tokenizer.eos_id).sum())
            text_bytes += int(self._sizes[block if learned is None else block[mask]].sum())
        return digest.hexdigest(), documents if piece.documents is None else piece.documents, text_bytes


def _stamp(path: Path) -> list[object]:
    try:
        stat = path.stat()
    except OSError:  # reported when the file is opened
        return []
    return [stat.st_size, stat.st_mtime_ns]
