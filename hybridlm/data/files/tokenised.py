"""A corpus that is tokenised already: its token files are read where they lie, and looked through once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from hybridlm.config.data import DataConfig
from hybridlm.data.corpus import Part, Prepared, TextSplit
from hybridlm.data.files.foreign_bins import ForeignFile, open_foreign
from hybridlm.data.files.stream import Piece, TokenStream
from hybridlm.data.keep import keep_json, kept_json
from hybridlm.data.reading.paths import find_files, shown
from hybridlm.data.tokenizer import Tokenizer, load_tokenizer
from hybridlm.errors import ConfigError, UserError
from hybridlm.files.home import expanded

_BLOCK = 1 << 22  # tokens
_ENDINGS = (".bin",)  # of the files of a folder


def open_tokenised(config: DataConfig, folder: Path, report: Callable[[str], None], *, whole: bool = False) -> Prepared:
    """``data.source=bins``. folder: for what is found of the files; whole: without ``data.val_path`` both splits are
    all of ``data.path``.

    ConfigError: a file or the tokenizer is missing or does not fit.
    """
    assert config.path is not None  # config.constraints has seen to both
    assert config.tokenizer.path is not None
    tokenizer = load_tokenizer(expanded(config.tokenizer.path), config.tokenizer.special_tokens)
    found = find_files("data.path", config.path, _ENDINGS)
    named = None if config.val_path is None else find_files("data.val_path", config.val_path, _ENDINGS)
    if named is not None:
        found = found.without(named)
    known = _Known(folder, f"{found.place}\0{'' if named is None else named.place}", config, tokenizer)
    train = [known.piece(path) for path in found.files.values()]
    files = f"{len(train)} files of " if len(train) > 1 else ""
    if named is not None:
        val = [known.piece(path) for path in named.files.values()]
        held = f"{sum(piece.size for piece in _joined(val)):,} of {named.shown}"
    elif whole:
        val, held = train, "none"
    else:
        count = sum(piece.size for piece in _joined(train))
        held_out = max(1, round(count * config.val_fraction))
        if min(held_out, count - held_out) < 2:
            raise ConfigError(
                f"data.path={shown(config.path)}: {count:,} tokens are too few to train on and to hold some out"
            )
        train, val = _cut(_joined(train), count - held_out, config)
        held = f"the last {held_out:,} of them"
    splits = [known.described(_joined(pieces)) for pieces in (train, val)]
    known.keep()
    name = hashlib.sha256("".join(piece.key for split in splits for piece in split.stream.pieces).encode()).hexdigest()
    total = len(splits[0].stream) + (0 if whole or named is not None else len(splits[1].stream))
    report(f"bins: {total:,} tokens in {files}{found.shown}, {held} held out for validation")
    return Prepared((Part("bins", 1.0, splits[0], splits[1], folder / f"bins-{name[:12]}"),), tokenizer)


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """As they stand in one stream: a file of ours ends with an eos, and the next one of ours begins with one."""
    ours = [piece.documents is not None for piece in pieces] + [False]
    return [replace(piece, open_end=ours[place] and ours[place + 1]) for place, piece in enumerate(pieces)]


def _cut(pieces: Sequence[Piece], at: int, config: DataConfig) -> tuple[list[Piece], list[Piece]]:
    """``pieces`` before and behind token ``at`` of their stream."""
    if any(piece.masked for piece in pieces):
        raise ConfigError(
            f"data.path={shown(config.path)} holds conversations, which are not cut: name others to validate on with"
            " data.val_path"
        )
    before: list[Piece] = []
    behind: list[Piece] = []
    for piece in pieces:
        if piece.size <= at:
            before.append(piece)
        elif at <= 0:
            behind.append(piece)
        else:
            # Places of documents are those of the whole file.
            before.append(replace(piece, count=at, documents=None, open_end=False))
            skipped = piece.offset + at * np.dtype(piece.dtype).itemsize
            behind.append(replace(piece, offset=skipped, count=piece.count - at, documents=None, open_end=False))
        at -= piece.size
    return before, behind


class _Known:
    """What was found of each file and of each stretch of one; it holds as long as the file keeps its size and time."""

    def __init__(self, folder: Path, place: str, config: DataConfig, tokenizer: Tokenizer) -> None:
        name = f"{place}\0{config.dtype}\0{tokenizer.fingerprint}"
        self._path = (
            folder / "scans" / f"{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}.json"
        )
        self._old, self._new = kept_json(self._path), dict[str, list[object]]()
        self._config, self._tokenizer = config, tokenizer
        self._sizes = tokenizer.token_bytes().astype(np.int64)

    def piece(self, path: Path) -> Piece:
        """A whole file, its ids checked if that was not done before."""
        stamp = self._stamp(path)
        known = stamp is not None and self._old.get(str(path)) == stamp
        file = open_foreign(path, dtype=self._config.dtype, vocab_size=self._tokenizer.vocab_size, scan=not known)
        if file.own is not None and file.own.tokenizer != self._tokenizer.fingerprint:
            raise UserError(
                f"token file {path} was made by another tokenizer than"
                f" data.tokenizer.path={self._config.tokenizer.path}"
            )
        if stamp is not None:
            self._new[str(path)] = stamp
        return _piece_of(file)

    def described(self, pieces: Sequence[Piece]) -> TextSplit:
        """The stream of ``pieces``, whose contents are counted if that was not done before."""
        facts = [self._facts(piece) for piece in pieces]
        named = [replace(piece, key=key) for piece, (key, _, _) in zip(pieces, facts, strict=True)]
        return TextSplit(
            TokenStream(named),
            sum(documents for _, documents, _ in facts),
            sum(text_bytes for _, _, text_bytes in facts),
        )

    def keep(self) -> None:
        if self._new != self._old:
            keep_json(self._path, self._new)

    def _stamp(self, path: Path) -> list[object] | None:
        try:
            stat = path.stat()
        except OSError:
            return None
        return [stat.st_size, stat.st_mtime_ns]

    def _facts(self, piece: Piece) -> tuple[str, int, int]:
        """Key, documents and bytes of text (of what is learned) of a piece."""
        name = f"{piece.path}:{piece.offset}+{piece.size}"
        stamp = self._stamp(piece.path)
        old = self._old.get(name)
        if old is None or old[0] != stamp:
            old = [stamp, *self._counted(piece)]
        self._new[name] = old
        return str(old[1]), int(old[2]), int(old[3])

    def _counted(self, piece: Piece) -> tuple[str, int, int]:
        digest = hashlib.sha256(f"{piece.documents}/{piece.masked}".encode())
        tokens, learned = piece.tokens(), piece.learned()
        documents = text_bytes = 0
        for first in range(0, piece.size, _BLOCK):
            block = tokens[first : min(first + _BLOCK, piece.size)]
            digest.update(np.ascontiguousarray(block).data)
            documents += int((block == self._tokenizer.eos_id).sum())
            if learned is not None:
                mask = learned[first : first + block.size]
                digest.update(np.ascontiguousarray(mask).data)
                block = block[mask]
            text_bytes += int(self._sizes[block].sum())
        return digest.hexdigest(), documents if piece.documents is None else piece.documents, text_bytes


def _piece_of(file: ForeignFile) -> Piece:
    return Piece(
        file.path,
        file.tokens.dtype.str,
        file.tokens.size,
        offset=file.offset,
        masked=file.own is not None and file.own.masked,
        documents=None if file.own is None else file.own.documents,
    )
