"""From a corpus to token files: read, split, tokenise, write once, find again."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from hybridlm.config.data import CorpusConfig, DataConfig
from hybridlm.data.chat import template_of
from hybridlm.data.corpus import Part, Prepared, TextSplit
from hybridlm.data.files import bins
from hybridlm.data.files.stream import TokenStream, joined
from hybridlm.data.files.tokenised import open_tokenised
from hybridlm.data.keep import cache_name, keep_json, kept_json
from hybridlm.data.preparing.build import (
    CONVERSATIONS_VERSION,
    FORMAT_VERSION,
    MANIFEST,
    TOKENIZER,
    Manifest,
    Report,
    Source,
    build,
)
from hybridlm.data.preparing.corpus_tokenizer import corpus_tokenizer
from hybridlm.data.preparing.tokenise import Problem, refusal
from hybridlm.data.progress import ByteProgress
from hybridlm.data.reading.documents import Bad
from hybridlm.data.reading.sources import open_corpus
from hybridlm.data.synthetic.source import open_synthetic
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import UserError
from hybridlm.files.home import expanded

_VERIFIED = "verified.json"
# Sources with nothing to tokenise, by ``data.source``; those with documents are in ``reading.sources``. Not all need
# the data folder, so it is passed as a function.
TOKENISED: dict[str, Callable[[DataConfig, Callable[[], Path], Report, bool], Prepared]] = {
    "bins": open_tokenised,
    "synthetic": open_synthetic,
}


def prepare(config: DataConfig, report: Report = lambda line: None, *, whole: bool = False) -> Prepared:
    """The prepared data of ``config``, built on first use; nothing in it depends on a seed. ``report`` gets a line per
    stage.

    whole: hold nothing out; both splits are all of the text.
    UserError: the corpus cannot be read or split, the folder cannot be written, or prepared files are damaged.
    """
    if config.source in TOKENISED:
        return TOKENISED[config.source](config, partial(data_folder, config), report, whole)
    place, began = data_folder(config), time.monotonic()
    sources = _sources(config, place, report, whole)
    tokenizer = corpus_tokenizer(config.tokenizer, sources, place / "tokenizers", report)
    if any(source.masked for source in sources):
        template_of(tokenizer)  # refuses a tokenizer without its tokens
    parts = []
    for source in sources:
        folder = place / f"{source.config.source}-{_fingerprint(config, source, tokenizer)[:12]}"
        found = folder.exists()
        if not found:
            shard_bytes = config.shard_mb * 1_000_000
            build(source, tokenizer, folder, shard_bytes=shard_bytes, workers=_workers(config), report=report)
        parts.append(_open(source, folder, report))
        report(f"{'already prepared' if found else f'prepared in {time.monotonic() - began:.1f} s'}: {folder}")
    return Prepared(tuple(parts), tokenizer)


def held_out_text(config: DataConfig, tokenizer: Tokenizer, limit: int) -> list[str]:
    """Up to ``limit`` tokens of validation text that has already been prepared with this tokenizer, as documents; empty
    if there is none. Prepares nothing."""
    found = sorted(data_folder(config).glob(f"*/{MANIFEST}"), key=lambda path: -path.stat().st_mtime)
    for path in found:
        try:
            manifest = Manifest.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            continue
        if manifest.tokenizer == tokenizer.fingerprint and manifest.val:
            stream = _split(path.parent, manifest.val, verified=True).stream
            ids = stream.read(0, min(len(stream), limit))
            return [tokenizer.decode(part) for part in np.split(ids, np.flatnonzero(ids == tokenizer.eos_id))]
    return []


def data_folder(config: DataConfig) -> Path:
    """Where prepared corpora are: ``data.out``, else ``data`` below $HYBRIDLM_CACHE, $XDG_CACHE_HOME/hybridlm or
    ~/.cache/hybridlm.

    UserError: there is no home folder, and none of the others is set.
    """
    if config.out is not None:
        return expanded(config.out).absolute()
    if cache := os.environ.get("HYBRIDLM_CACHE"):
        return expanded(cache).absolute() / "data"
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).absolute() / "hybridlm" / "data"
    try:
        return Path.home() / ".cache" / "hybridlm" / "data"
    except RuntimeError:
        raise UserError(
            "nowhere to store prepared data: HOME is not set; choose a folder with data.out or HYBRIDLM_CACHE"
        ) from None


def _sources(config: DataConfig, place: Path, report: Report, whole: bool) -> list[Source]:
    corpora: list[tuple[str, float, CorpusConfig]] = [(config.source, 1.0, config)]
    if config.source == "mixture":
        corpora = [(name, part.weight, part) for name, part in config.parts.items()]
    sources, read = [], 0
    with ByteProgress("reading", 0, report) as progress:

        def advance(size: int) -> None:
            nonlocal read
            read += size
            progress.update_to(read)

        for name, weight, corpus in corpora:
            opened = open_corpus(corpus, unit_bytes=config.shard_mb * 1_000_000, cache=place, progress=advance)
            named = 0 if whole and opened.named is None else opened.named
            sources.append(Source(name, weight, corpus, replace(opened, named=named), config.val_fraction))
    for line in (f"{source.name}: {note}" for source in sources for note in source.corpus.notes):
        report(line)
    return sources


def _fingerprint(config: DataConfig, source: Source, tokenizer: Tokenizer) -> str:
    """SHA-256 of everything the prepared files depend on."""
    facts = {
        "formats": [FORMAT_VERSION, bins.FORMAT_VERSION],
        "tokenizer": tokenizer.fingerprint,
        "corpus": source.corpus.fingerprint,
        "split": source.split_facts,
        "dedup": source.config.dedup,
        "shard_mb": config.shard_mb,
        **({"conversations": CONVERSATIONS_VERSION} if source.masked else {}),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _workers(config: DataConfig) -> int:
    """Processes that tokenise: by default as many as this process may use cores."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return mine if config.prepare_workers == "auto" else config.prepare_workers


def _open(source: Source, folder: Path, report: Report) -> Part:
    """A prepared folder; reports what it holds, and what was left out."""
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (OSError, ValidationError) as error:
        reason = "cannot be read" if isinstance(error, OSError) else "is damaged"
        raise UserError(f"{folder / MANIFEST} {reason}; delete its folder and prepare again") from None
    if manifest.tokenizer != Tokenizer.load(folder / TOKENIZER).fingerprint:
        raise UserError(
            f"{folder}: its token files were not made by its own tokenizer; delete the folder and prepare again"
        )
    if manifest.mistakes:
        _report_problems(source, manifest.mistakes, manifest.documents, report)
    if manifest.forms:
        kinds = sorted(manifest.forms.items(), key=lambda kind: -kind[1])
        report(f"{source.name}: {', '.join(f'{count:,} x {form}' for form, count in kinds)}")
    if manifest.duplicates:
        report(f"{source.name}: {manifest.duplicates:,} duplicate documents left out (data.dedup=true)")
    stamp = _stamp(folder)
    verified = kept_json(folder / _VERIFIED).get("stamp") == stamp
    train, val = (_split(folder, files, verified) for files in (manifest.train, manifest.val or manifest.train))
    if not verified:
        keep_json(folder / _VERIFIED, {"stamp": stamp})
    val = replace(val, gzip_bytes=manifest.gzip_bytes, xz_bytes=manifest.xz_bytes)
    size = train.text_bytes + val.text_bytes
    text = f"{size / 1e6:,.2f} MB" if size >= 100_000 else f"{size:,} bytes"
    learned = " to learn" if val.stream.masked else ""
    count = f"{manifest.documents:,} document{'s' if manifest.documents != 1 else ''}"
    report(f"{source.name}: {count}, {text} of text{learned}, {_held_out(source, manifest, val)}")
    for name, side in (("train", train), ("val", val)):
        report(f"{name}: {len(side.stream):,} tokens{_yardstick(side)}")
    return Part(source.name, source.weight, train, val, folder)


def _held_out(source: Source, manifest: Manifest, val: TextSplit) -> str:
    """What is validated on, and why that."""
    if not manifest.val:
        return "none of it held out"
    if source.corpus.named is not None:
        return f"{val.documents:,} of them from data.val_path, for validation"
    if manifest.cut:
        return f"the last {source.val_fraction:.3g} of it held out for validation (data.val_path can name other texts)"
    held_out = f"{val.documents:,} of them held out for validation"
    if manifest.below == source.val_fraction:
        return held_out
    return f"{held_out} (data.val_fraction={source.val_fraction} alone would leave one side empty)"


def _yardstick(side: TextSplit) -> str:
    if side.stream.masked:  # the text is that of some of the tokens
        return ""
    line = f", {side.text_bytes / len(side.stream):.2f} bytes per token"
    if side.gzip_bytes is None or side.xz_bytes is None:
        return line
    gzip, xz = (8 * size / side.text_bytes for size in (side.gzip_bytes, side.xz_bytes))
    return f"{line}, gzip -9 {gzip:.3f} and xz -9 {xz:.3f} bits per byte"


def _split(folder: Path, files: dict[str, bins.BinMeta], verified: bool) -> TextSplit:
    stream = joined(bins.open_bin(folder / f"{stem}.bin", meta, verify=not verified) for stem, meta in files.items())
    documents, text_bytes = zip(*((meta.documents, meta.text_bytes) for meta in files.values()), strict=True)
    return TextSplit(TokenStream(stream), sum(documents), sum(text_bytes))


def _stamp(folder: Path) -> str:
    """Names, sizes and times of the files: while these stay, the hashes are not checked again."""
    stats = {entry.name: entry.stat() for entry in os.scandir(folder) if entry.name.endswith((".bin", ".idx", ".mask"))}
    return cache_name(*(f"{name}/{stat.st_size}/{stat.st_mtime_ns}" for name, stat in sorted(stats.items())))


def _report_problems(source: Source, problems: Sequence[Problem], good: int, report: Report) -> None:
    first = problems[0]
    if source.config.on_bad == "fail":
        raise refusal(Bad(first.first, first.what, first.detail))
    bad = sum(problem.count for problem in problems)
    kinds = "; ".join(
        f"{problem.count:,} x {problem.what} (first {problem.first}{f', {problem.detail}' if problem.detail else ''})"
        for problem in problems
    )
    report(f"{source.name}: {bad:,} of {good + bad:,} documents left out: {kinds}")
