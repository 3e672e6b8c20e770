"""A corpus that another program has tokenised: its token files are read where they lie."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from hybridlm.config.data import DataConfig
from hybridlm.config.section import ConfigError
from hybridlm.data.bins import FORMAT_VERSION, BinMeta, TokenFile
from hybridlm.data.corpus import Prepared
from hybridlm.data.foreign_bins import open_foreign
from hybridlm.data.tokenizer import Tokenizer, load_tokenizer

_BLOCK = 1 << 22  # tokens


def open_tokenised(config: DataConfig, folder: Path, report: Callable[[str], None]) -> Prepared:
    """``data.source=bins``. folder: for what is made of the corpus. ConfigError: a file or the tokenizer is missing or does not fit."""
    assert config.path is not None  # config.constraints has seen to both
    assert config.tokenizer.path is not None
    tokenizer = load_tokenizer(Path(config.tokenizer.path).expanduser())
    path, tokens = _open(config, config.path, tokenizer)
    if config.val_path is None:
        held_out = max(1, round(len(tokens) * config.val_fraction))
        val_path, val, train = path, tokens[len(tokens) - held_out :], tokens[: len(tokens) - held_out]
    else:
        (val_path, val), train = _open(config, config.val_path, tokenizer), tokens
    if min(len(train), len(val)) < 2:
        raise ConfigError(f"data.path={config.path}: {len(tokens):,} tokens are too few to train on and to hold some out")
    files = [_described(path, train, tokenizer), _described(val_path, val, tokenizer)]
    held = f"the last {len(val):,} of them" if config.val_path is None else f"{len(val):,} of {val_path.name}"
    report(f"bins: {len(tokens):,} tokens of {path}, {held} held out for validation")
    return Prepared(folder / f"bins-{files[0].meta.sha256[:12]}", files[0], files[1], tokenizer)


def _open(config: DataConfig, name: str, tokenizer: Tokenizer) -> tuple[Path, np.ndarray]:
    path = Path(name).expanduser()
    return path, open_foreign(path, dtype=config.dtype, vocab_size=tokenizer.vocab_size).tokens


def _described(path: Path, tokens: np.ndarray, tokenizer: Tokenizer) -> TokenFile:
    """What a sidecar would say, counted block by block."""
    digest, sizes = hashlib.sha256(), tokenizer.token_bytes().astype(np.int64)
    documents = text_bytes = 0
    for first in range(0, len(tokens), _BLOCK):
        block = tokens[first : first + _BLOCK]
        digest.update(np.ascontiguousarray(block).data)
        documents += int((block == tokenizer.eos_id).sum())
        text_bytes += int(sizes[block].sum())
    meta = BinMeta(
        format_version=FORMAT_VERSION,
        dtype="<u2" if tokens.dtype.itemsize == 2 else "<u4",
        count=len(tokens),
        documents=documents,
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer.fingerprint,
        sha256=digest.hexdigest(),
        text_bytes=text_bytes,
    )
    return TokenFile(path, tokens, meta)
