"""Token files and what is made of them, for the tests: documents of chosen ids, no tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from hybridlm.data.corpus import Part, Prepared, TextSplit
from hybridlm.data.files.bins import BinWriter, open_bin, read_meta
from hybridlm.data.files.stream import Piece, TokenStream, joined
from hybridlm.data.tokenizer import byte_tokenizer
from hybridlm.data.windows.packing import Packing

EOS = 256


def raw_stream(
    folder: Path, arrays: Sequence[Sequence[int]], masks: Sequence[Sequence[bool]] | None = None
) -> TokenStream:
    """A stream of files without an index, one for each array."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = []
    for number, ids in enumerate(arrays):
        path = folder / f"{number}.bin"
        np.asarray(ids, dtype="<u2").tofile(path)
        if masks is not None:
            np.asarray(masks[number], dtype="?").tofile(path.with_suffix(".mask"))
        pieces.append(Piece(path, "<u2", len(ids), masked=masks is not None, key=f"{folder.name}/{number}"))
    return TokenStream(pieces)


def token_file(
    path: Path, documents: Sequence[Sequence[int]], learned: Sequence[Sequence[bool]] | None = None
) -> Piece:
    """A file of ours; the text of a document is as many bytes as it has learned tokens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with BinWriter(path, eos_id=EOS, vocab_size=257, tokenizer="none", masked=learned is not None) as writer:
        for number, ids in enumerate(documents):
            mask = None if learned is None else np.asarray(learned[number], dtype=bool)
            writer.add(np.asarray(ids, dtype=np.int64), len(ids) if mask is None else int(mask.sum()), mask)
        writer.finish()
    return open_bin(path, read_meta(path))


def some_documents(count: int, seed: int, longest: int = 40) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, rng.integers(0, longest)).tolist() for _ in range(count)]


def split(
    folder: Path, documents: Sequence[Sequence[int]], files: int = 2, learned: Sequence[Sequence[bool]] | None = None
) -> TextSplit:
    """Documents dealt over so many token files, one stretch of them to each."""
    edges = [len(documents) * k // files for k in range(files + 1)]
    pieces = [
        token_file(folder / f"{k}.bin", documents[a:b], None if learned is None else learned[a:b])
        for k, (a, b) in enumerate(pairwise(edges))
    ]
    metas = [read_meta(piece.path) for piece in pieces]
    return TextSplit(
        TokenStream(joined(pieces)), sum(meta.documents for meta in metas), sum(meta.text_bytes for meta in metas)
    )


def part(
    folder: Path, name: str = "all", weight: float = 1.0, *, train: int = 40, val: int = 12, seed: int = 0
) -> Part:
    return Part(
        name,
        weight,
        split(folder / name / "train", some_documents(train, seed)),
        split(folder / name / "val", some_documents(val, seed + 1000)),
        folder / name,
    )


def prepared(*parts: Part) -> Prepared:
    return Prepared(parts, byte_tokenizer())


def window_of(packing: Packing, tokens: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``ids``, ``targets`` and ``doc_ids`` of a window, each (seq_len,) int64, with every token learned."""
    ids, targets, doc_ids = rows = np.empty((3, packing.seq_len), dtype=np.int64)
    packing.fill(tokens, None, number, rows)
    return ids, targets, doc_ids


def efficiency(packing: Packing) -> float:
    """The share of columns that hold a pair."""
    return packing.pairs / (len(packing) * packing.seq_len)
