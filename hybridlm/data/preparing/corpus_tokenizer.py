"""The tokenizer of a corpus: read from a file, or trained on its training documents and cached."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hybridlm.config.data import TokenizerConfig
from hybridlm.data.keep import unwritable
from hybridlm.data.preparing.build import FORMAT_VERSION, Source
from hybridlm.data.reading.documents import Document
from hybridlm.data.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe
from hybridlm.data.tokenizer.cuts import SPLITS, learnable, thinned
from hybridlm.files.home import expanded


def corpus_tokenizer(
    settings: TokenizerConfig, sources: Sequence[Source], folder: Path, report: Callable[[str], None]
) -> Tokenizer:
    """The tokenizer of ``data.tokenizer``; a BPE is trained once per corpus and kept in ``folder``."""
    if settings.path is not None:
        tokenizer = load_tokenizer(expanded(settings.path), settings.special_tokens)
        if not tokenizer.lossless:
            report("tokenizer: it normalises text to Unicode NFC, whose bytes are those counted in bits per byte")
        return tokenizer
    if settings.kind == "bytes":
        return byte_tokenizer(settings.special_tokens)
    made_of = [[source.corpus.fingerprint, source.weight, *source.split_facts] for source in sources]
    pattern, specials = SPLITS[settings.split], settings.special_tokens
    facts = [FORMAT_VERSION, made_of, settings.vocab_size, pattern, specials, settings.train_mb]
    kept = folder / f"bpe-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]}.json"
    if kept.exists():
        return Tokenizer.load(kept)
    tokenizer = _trained(settings, sources, report)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(kept)
    except OSError as error:
        raise unwritable(kept.parent, error) from None
    return tokenizer


def _trained(settings: TokenizerConfig, sources: Sequence[Source], report: Callable[[str], None]) -> Tokenizer:
    began = time.monotonic()
    limit, share = settings.train_mb * 1_000_000, 1.0
    while (less := learnable(thinned(_sample(sources, limit), share))) < 1:
        share *= min(less, 0.9)
    texts = thinned(_sample(sources, limit), share)
    tokenizer = train_bpe(texts, settings.vocab_size, settings.special_tokens, settings.split)
    size = f"{tokenizer.vocab_size} ids"
    if tokenizer.vocab_size < settings.vocab_size:
        size += f" instead of the requested {settings.vocab_size} (no other pair occurs twice in this corpus)"
    if share < 1:
        size += f", from {share:.1%} of the text (words that rarely repeat, or text without spaces, need much memory)"
    report(f"tokenizer: byte-level BPE with {size}, trained in {time.monotonic() - began:.1f} s")
    return tokenizer


def _sample(sources: Sequence[Source], limit: int) -> Iterator[str]:
    """Training texts of at most about ``limit`` bytes: the beginning of every unit, and from each source its weight's
    share."""
    weights = sum(source.weight for source in sources)
    sizes = [sum(unit.size for unit in source.corpus.units) for source in sources]
    whole = all(sizes) and sum(sizes) <= limit
    for source, size in zip(sources, sizes, strict=True):
        share = limit * source.weight / weights
        for number, unit in enumerate(source.corpus.units):
            left = float("inf") if whole else share * unit.size / size if size else share / len(source.corpus.units)
            for document in unit.documents():
                parts = source.split.deal(number, document) if isinstance(document, Document) else ()
                for part in (part for side, part in parts if side == "train"):
                    yield from part.texts
                    left -= part.size
                if left <= 0:
                    break
