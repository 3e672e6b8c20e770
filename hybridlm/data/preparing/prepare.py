"""From a corpus to token files: read, split, tokenise, write once, find again."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError

from hybridlm.config.data import CorpusConfig, DataConfig, TokenizerConfig
from hybridlm.data.chat import template_of
from hybridlm.data.corpus import Part, Prepared, TextSplit
from hybridlm.data.files import bins
from hybridlm.data.files.stream import split_of
from hybridlm.data.files.tokenised import open_tokenised
from hybridlm.data.keep import keep_json, kept_json, unwritable
from hybridlm.data.preparing import build
from hybridlm.data.preparing.build import MANIFEST, TOKENIZER, Manifest, Order
from hybridlm.data.preparing.source import Source
from hybridlm.data.preparing.split import Refused
from hybridlm.data.preparing.tokenise import NO_CUT, Mistakes, refusal
from hybridlm.data.progress import ByteProgress
from hybridlm.data.reading.documents import Bad
from hybridlm.data.reading.sources import open_corpus
from hybridlm.data.synthetic.source import announced
from hybridlm.data.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe
from hybridlm.data.tokenizer_pieces import OWN_CUTS, SPLIT_PATTERN, learnable, thinned, too_long
from hybridlm.errors import UserError
from hybridlm.files.home import expanded

_VERIFIED = "verified.json"
Report = Callable[[str], None]


def prepare(config: DataConfig, report: Report = lambda line: None, *, whole: bool = False) -> Prepared:
    """The prepared data of ``config``, built on first use; nothing in it depends on a seed. ``report`` gets a line per
    stage.

    whole: nothing is held out; both splits are all of the text.
    ConfigError: the corpus cannot be read or split, the folder cannot be written, or prepared files are damaged.
    """
    if config.source == "synthetic":
        return announced(config, report)
    if config.source == "bins":
        return open_tokenised(config, data_folder(config), report, whole=whole)
    began = time.monotonic()
    sources = _sources(config, report, whole)
    tokenizer = _tokenizer(config, sources, report)
    if any(source.config.format == "chat" for source in sources):
        template_of(tokenizer)  # refuses a tokenizer without the tokens that it takes
    parts = []
    for source in sources:
        folder = data_folder(config) / f"{source.config.source}-{_fingerprint(config, source, tokenizer)[:12]}"
        found = folder.exists()
        if not found:
            build.build(_order(config, source, tokenizer, folder), report)
        part = _open(source, folder, report)
        parts.append(part)
        report(f"{'already prepared' if found else f'prepared in {time.monotonic() - began:.1f} s'}: {folder}")
    return Prepared(tuple(parts), tokenizer)


def data_folder(config: DataConfig) -> Path:
    """Where prepared corpora lie: ``data.out``, else ``data`` below $HYBRIDLM_CACHE, $XDG_CACHE_HOME/hybridlm or
    ~/.cache/hybridlm.

    UserError: no home, and none of the others is given.
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
            "no place for prepared data: HOME is not set; name one with data.out, or with HYBRIDLM_CACHE"
        ) from None


def _sources(config: DataConfig, report: Report, whole: bool) -> list[Source]:
    corpora: list[tuple[str, float, CorpusConfig]] = [(config.source, 1.0, config)]
    if config.source == "mixture":
        corpora = [(name, part.weight, part) for name, part in config.parts.items()]
    sources, read = [], 0
    with ByteProgress("reading", 0, report) as progress:

        def advance(size: int) -> None:
            nonlocal read
            read += size
            progress.update(read)

        for name, weight, corpus in corpora:
            opened = open_corpus(
                corpus, unit_bytes=config.shard_mb * 1_000_000, cache=data_folder(config), progress=advance
            )
            if whole and opened.named is None:
                opened = replace(opened, named=0)
            sources.append(Source(name, weight, corpus, opened, config.val_fraction))
    for source in sources:
        for note in source.corpus.notes:
            report(f"{source.name}: {note}")
    return sources


def _fingerprint(config: DataConfig, source: Source, tokenizer: Tokenizer) -> str:
    """SHA-256 of all that the prepared files depend on."""
    facts = {
        "formats": [build.FORMAT_VERSION, bins.FORMAT_VERSION],
        "tokenizer": tokenizer.fingerprint,
        "corpus": source.corpus.fingerprint,
        "split": source.split_facts,
        "dedup": source.config.dedup,
        "shard_mb": config.shard_mb,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _order(config: DataConfig, source: Source, tokenizer: Tokenizer, folder: Path) -> Order:
    return Order(
        name=source.name,
        corpus=source.corpus,
        tokenizer=tokenizer,
        folder=folder,
        masked=source.config.format == "chat",
        dedup=source.config.dedup,
        fail_on_bad=source.config.on_bad == "fail",
        split=lambda: source.split,
        shard_bytes=config.shard_mb * 1_000_000,
        workers=_workers(config),
    )


def _workers(config: DataConfig) -> int:
    """Processes that tokenise: as many as there are cores that this one may use, where nothing else is said."""
    if config.prepare_workers != "auto":
        return config.prepare_workers
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tokenizer(config: DataConfig, sources: Sequence[Source], report: Report) -> Tokenizer:
    """The tokenizer of ``data.tokenizer``; a BPE is trained once for a corpus and kept."""
    settings = config.tokenizer
    if settings.path is not None:
        tokenizer = load_tokenizer(expanded(settings.path), settings.special_tokens)
        if not tokenizer.lossless:
            report(
                "tokenizer: it brings text into Unicode's normal form NFC, whose bytes are those that bits per byte"
                " count"
            )
        return tokenizer
    if settings.kind == "bytes":
        return byte_tokenizer(settings.special_tokens)
    made_of = [[source.corpus.fingerprint, source.weight, *source.split_facts] for source in sources]
    facts = [
        build.FORMAT_VERSION,
        made_of,
        settings.vocab_size,
        SPLIT_PATTERN,
        settings.special_tokens,
        settings.train_mb,
    ]
    kept = (
        data_folder(config) / "tokenizers" / f"bpe-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]}.json"
    )
    if kept.exists():
        return Tokenizer.load(kept)
    tokenizer = _trained(settings, sources, report)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(kept)
    except OSError as error:
        raise unwritable(kept.parent, error) from None
    return tokenizer


def _trained(settings: TokenizerConfig, sources: Sequence[Source], report: Report) -> Tokenizer:
    began = time.monotonic()
    limit, share = settings.train_mb * 1_000_000, 1.0
    while (less := learnable(thinned(_sample(sources, limit), share))) < 1:
        share *= min(less, 0.9)
    tokenizer = train_bpe(thinned(_sample(sources, limit), share), settings.vocab_size, settings.special_tokens)
    size = f"{tokenizer.vocab_size} ids"
    if tokenizer.vocab_size < settings.vocab_size:
        size += f" instead of the {settings.vocab_size} asked for (no other pair occurs twice in this corpus)"
    if share < 1:
        size += f", of {share:.1%} of the text (words that hardly repeat, or no blanks between them, take much memory)"
    report(f"tokenizer: byte-level BPE with {size}, trained in {time.monotonic() - began:.1f} s")
    return tokenizer


def _sample(sources: Sequence[Source], limit: int) -> Iterator[str]:
    """Training texts of about ``limit`` bytes at most: the beginning of every unit, and of each source its weight's
    share."""
    weights = sum(source.weight for source in sources)
    sizes = [sum(unit.size for unit in source.corpus.units) for source in sources]
    whole = all(sizes) and sum(sizes) <= limit
    for source, size in zip(sources, sizes, strict=True):
        share = limit * source.weight / weights
        good = bad = 0
        first: Bad | None = None
        for number, unit in enumerate(source.corpus.units):
            left = float("inf") if whole else share * unit.size / size if size else share / len(source.corpus.units)
            for document in unit.documents():
                if isinstance(document, Bad):
                    if source.config.on_bad == "fail":
                        raise refusal(document)
                    bad, first = bad + 1, first or document
                    continue
                if any(too_long(text, OWN_CUTS) for text in document.texts):
                    bad, first = bad + 1, first or Bad(document.name, NO_CUT)
                    continue
                good += 1
                for side, part in source.split.deal(number, document):
                    if side == "train":
                        yield from part.texts
                        left -= part.size
                if left <= 0:
                    break
        if bad and not good:
            raise Refused(f"{source.name}: none of its {bad} document(s) can be used; the first: {first}")


def _open(source: Source, folder: Path, report: Report) -> Part:
    """A prepared folder; says what it holds, and what was left out of it."""
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (OSError, ValidationError) as error:
        reason = "cannot be read" if isinstance(error, OSError) else "is damaged"
        raise UserError(f"{folder / MANIFEST} {reason}; delete its folder and prepare again") from None
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    if manifest.tokenizer != tokenizer.fingerprint:
        raise UserError(
            f"{folder}: its token files were not made by the tokenizer beside them; delete the folder and prepare again"
        )
    if manifest.mistakes:
        _say_mistakes(source, manifest.mistakes, manifest.documents, report)
    if manifest.duplicates:
        report(f"{source.name}: {manifest.duplicates:,} documents left out whose text came before (data.dedup=true)")
    stamp = _stamp(folder)
    known = kept_json(folder / _VERIFIED).get("stamp") == stamp
    train, val = (_split(folder, files, known) for files in (manifest.train, manifest.val or manifest.train))
    if not known:
        keep_json(folder / _VERIFIED, {"stamp": stamp})
    val = TextSplit(val.stream, val.documents, val.text_bytes, manifest.gzip_bytes, manifest.xz_bytes)
    size = train.text_bytes + val.text_bytes
    text = (
        f"{f'{size / 1e6:,.2f} MB' if size >= 100_000 else f'{size:,} bytes'} of"
        f" text{' to learn' if val.stream.masked else ''}"
    )
    count = f"{manifest.documents:,} document{'s' if manifest.documents != 1 else ''}"
    report(f"{source.name}: {count}, {text}, {_held_out(source, manifest, val)}")
    for name, side in (("train", train), ("val", val)):
        report(f"{name}: {len(side.stream):,} tokens{_yardstick(side)}")
    return Part(source.name, source.weight, train, val, folder)


def _held_out(source: Source, manifest: Manifest, val: TextSplit) -> str:
    """What is validated on, and why that."""
    if not manifest.val:
        return "none of it held out"
    if source.corpus.named is not None:
        return f"{val.documents:,} of them those of data.val_path, to validate on"
    if manifest.cut:
        return (
            f"of which the last {source.val_fraction:.3g} is held out for validation (data.val_path names other texts)"
        )
    why = (
        ""
        if manifest.below == source.val_fraction
        else f" (data.val_fraction={source.val_fraction} alone leaves one side empty)"
    )
    return f"{val.documents:,} of them held out for validation{why}"


def _yardstick(side: TextSplit) -> str:
    if side.stream.masked:  # the text is that of some of the tokens
        return ""
    line = f", {side.text_bytes / len(side.stream):.2f} bytes per token"
    if side.gzip_bytes is not None and side.xz_bytes is not None:
        gzip, xz = (8 * size / side.text_bytes for size in (side.gzip_bytes, side.xz_bytes))
        line += f", gzip -9 {gzip:.3f} and xz -9 {xz:.3f} bits per byte"
    return line


def _split(folder: Path, files: dict[str, bins.BinMeta], verified: bool) -> TextSplit:
    opened = [bins.open_bin(folder / f"{stem}.bin", meta, verify=not verified) for stem, meta in files.items()]
    documents, text_bytes = (
        sum(getattr(meta, name) for meta in files.values()) for name in ("documents", "text_bytes")
    )
    return TextSplit(split_of(opened), documents, text_bytes)


def _stamp(folder: Path) -> str:
    """Names, sizes and times of the files: while these stay, the hashes need no second look."""
    digest = hashlib.sha256()
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.endswith((".bin", ".idx", ".mask")):
            stat = entry.stat()
            digest.update(f"{entry.name}/{stat.st_size}/{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _say_mistakes(source: Source, mistakes: Sequence[Mistakes], good: int, report: Report) -> None:
    first = mistakes[0]
    if source.config.on_bad == "fail":
        raise refusal(Bad(first.first, first.what, first.detail))
    bad = sum(mistake.count for mistake in mistakes)
    kinds = "; ".join(
        f"{mistake.count:,} x {mistake.what} (first {mistake.first}{f', {mistake.detail}' if mistake.detail else ''})"
        for mistake in mistakes
    )
    report(f"{source.name}: {bad:,} of {good + bad:,} documents left out: {kinds}")
