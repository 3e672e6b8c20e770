"""From a corpus to token files: read, split, tokenise, write once, find again.

The result is named after everything it depends on, built in a folder of its own and renamed into place, so a second run finds it, two runs
at once cannot disturb each other, and one that is killed leaves nothing that would be used.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import shutil
import time
import unicodedata
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from hybridlm.config.data import DataConfig, TokenizerConfig
from hybridlm.config.section import ConfigError
from hybridlm.data import bins
from hybridlm.data.bins import open_bin, write_bin
from hybridlm.data.corpus import Prepared
from hybridlm.data.readers import Document
from hybridlm.data.sources import documents, split
from hybridlm.data.tokenised import open_tokenised
from hybridlm.data.tokenizer import EOS, SPLIT_PATTERN, Tokenizer, byte_tokenizer, load_tokenizer, train_bpe

FORMAT_VERSION = 1
_STALE_AFTER = 24 * 3600.0  # seconds after which another process' unfinished folder is taken for dead


def prepare(config: DataConfig, report: Callable[[str], None] = lambda line: None) -> Prepared:
    """The prepared data of ``config``, built on first use; nothing in it depends on a seed. ``report`` gets a line per stage.

    ConfigError: the corpus cannot be read or split, the folder cannot be written, or prepared files are damaged.
    """
    if config.source == "bins":
        return open_tokenised(config, data_folder(config), report)
    began = time.monotonic()
    given = _given_tokenizer(config.tokenizer)
    corpus = list(documents(config))
    train, val = split(corpus, config.val_fraction)
    size = sum(len(document.text.encode()) for document in corpus)
    report(f"{config.source}: {len(corpus)} documents, {size / 1e6:.2f} MB of text, {len(val)} of them held out for validation")
    folder = data_folder(config) / f"{config.source}-{_fingerprint(config, given, train, val)[:12]}"
    if not folder.exists():
        _build(config, given, train, val, folder, report)
        prepared = _open(folder)
        report(f"prepared in {time.monotonic() - began:.1f} s: {folder}")
        return prepared
    prepared = _open(folder)
    report(f"already prepared: {folder} ({prepared.train.meta.count:,} training and {prepared.val.meta.count:,} validation tokens)")
    return prepared


def data_folder(config: DataConfig) -> Path:
    """Where prepared corpora lie: ``data.out``, else ``data`` below $HYBRIDLM_CACHE, $XDG_CACHE_HOME/hybridlm or ~/.cache/hybridlm."""
    if config.out is not None:
        return Path(config.out).expanduser().absolute()
    if cache := os.environ.get("HYBRIDLM_CACHE"):
        return Path(cache).expanduser().absolute() / "data"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache").absolute() / "hybridlm" / "data"


def _given_tokenizer(config: TokenizerConfig) -> Tokenizer | None:
    """The tokenizer of ``data.tokenizer.path``, None if it is to be made. ConfigError: it cannot be used."""
    return None if config.path is None else load_tokenizer(Path(config.path).expanduser())


def _fingerprint(config: DataConfig, given: Tokenizer | None, train: Sequence[Document], val: Sequence[Document]) -> str:
    """SHA-256 of all that the prepared files depend on."""
    made = ["bpe", config.tokenizer.vocab_size, SPLIT_PATTERN, EOS] if config.tokenizer.kind == "bpe" else ["bytes", EOS]
    facts = {
        "formats": [FORMAT_VERSION, bins.FORMAT_VERSION],
        "tokenizer": made if given is None else ["file", given.fingerprint],
        "train": [[document.name, hashlib.sha256(document.text.encode()).hexdigest()] for document in train],
        "val": [[document.name, hashlib.sha256(document.text.encode()).hexdigest()] for document in val],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _build(
    config: DataConfig,
    given: Tokenizer | None,
    train: Sequence[Document],
    val: Sequence[Document],
    folder: Path,
    report: Callable[[str], None],
) -> None:
    # Beside the final folder, so that the rename stays within one file system.
    unfinished = folder.parent / f".{folder.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
    try:
        try:
            unfinished.mkdir(parents=True)
            _remove_stale(folder)
            tokenizer = given or _make_tokenizer(config.tokenizer, train, report)
            if not tokenizer.lossless:
                report("tokenizer: it brings text into Unicode's normal form NFC, whose bytes are those that bits per byte count")
            tokenizer.save(unfinished / "tokenizer.json")
            _write(unfinished / "train.bin", train, tokenizer, report, compress=False)
            _write(unfinished / "val.bin", val, tokenizer, report, compress=True)
            _publish(unfinished, folder)
        except OSError as error:
            raise ConfigError(f"data cannot be written to {folder} ({error.strerror}); name another place with data.out") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _publish(unfinished: Path, folder: Path) -> None:
    try:
        os.replace(unfinished, folder)
    except OSError:
        # A folder that holds files is never replaced: another process was first, with the same content by construction of the name.
        if not folder.is_dir():
            raise


def _remove_stale(folder: Path) -> None:
    for other in folder.parent.glob(f".{folder.name}.*"):
        try:
            if time.time() - other.stat().st_mtime > _STALE_AFTER:
                shutil.rmtree(other, ignore_errors=True)
        except OSError:
            continue  # its owner was faster


def _make_tokenizer(config: TokenizerConfig, train: Sequence[Document], report: Callable[[str], None]) -> Tokenizer:
    if config.kind == "bytes":
        return byte_tokenizer()
    began = time.monotonic()
    tokenizer = train_bpe((document.text for document in train), config.vocab_size)
    size = f"{tokenizer.vocab_size} ids"
    if tokenizer.vocab_size < config.vocab_size:
        size += f" instead of the {config.vocab_size} asked for (no other pair occurs twice in this corpus)"
    report(f"tokenizer: byte-level BPE with {size}, trained in {time.monotonic() - began:.1f} s")
    return tokenizer


def _write(path: Path, corpus: Sequence[Document], tokenizer: Tokenizer, report: Callable[[str], None], *, compress: bool) -> None:
    """One token file. ``compress``: also measure what general-purpose compressors make of the text, the yardstick for bits per byte."""
    began = time.monotonic()
    texts = [document.text if tokenizer.lossless else unicodedata.normalize("NFC", document.text) for document in corpus]
    text = "".join(texts).encode()  # what the ids stand for
    meta = write_bin(
        path,
        tokenizer.encode_documents(document.text for document in corpus),
        eos_id=tokenizer.eos_id,
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer.fingerprint,
        text_bytes=len(text),
        gzip_bytes=len(gzip.compress(text, compresslevel=9, mtime=0)) if compress else None,
        xz_bytes=len(lzma.compress(text, preset=9)) if compress else None,
    )
    line = f"{path.stem}: {meta.count:,} tokens, {meta.text_bytes / meta.count:.2f} bytes per token"
    if meta.gzip_bytes is not None and meta.xz_bytes is not None:
        line += f", gzip -9 {8 * meta.gzip_bytes / meta.text_bytes:.3f} and xz -9 {8 * meta.xz_bytes / meta.text_bytes:.3f} bits per byte"
    report(f"{line}, {time.monotonic() - began:.1f} s")


def _open(folder: Path) -> Prepared:
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    train, val = open_bin(folder / "train.bin"), open_bin(folder / "val.bin")
    for file in (train, val):
        if file.meta.tokenizer != tokenizer.fingerprint:
            raise ConfigError(f"token file {file.path} was not made by the tokenizer beside it; delete its folder and prepare again")
    return Prepared(folder, train, val, tokenizer)
