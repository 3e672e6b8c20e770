"""A corpus that is ready for training, and its documents packed into windows."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hybridlm.data.bins import TokenFile
from hybridlm.data.packing import Packing, pack
from hybridlm.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prepared:
    """A prepared corpus: the folder for what is made of it, the two token streams, and the tokenizer that made them."""

    folder: Path
    train: TokenFile
    val: TokenFile
    tokenizer: Tokenizer


def packed_documents(prepared: Prepared, seq_len: int) -> Packing:
    """The training documents packed whole into windows of ``seq_len``: made once for a corpus, and kept in its folder where that may be."""
    train = prepared.train
    path, key = prepared.folder / f"train.packed-{seq_len}.npz", f"{train.meta.sha256}/{seq_len}"
    packing = Packing.load(path, key)
    if packing is None:
        packing = pack(document_starts(train.tokens, prepared.tokenizer.eos_id), seq_len)
        with contextlib.suppress(OSError):  # where nothing may be written the corpus is packed at every start
            path.parent.mkdir(parents=True, exist_ok=True)
            packing.save(path, key)
    return packing


def document_starts(tokens: np.ndarray, eos_id: int) -> np.ndarray:
    """Places of the end-of-text before each document and, last, behind all of them: (documents + 1,) int64.

    Text never holds that id, so it stands between documents only. Other programs leave out the first one or the last: then the first or
    last token of all takes its place.
    """
    starts = np.flatnonzero(tokens == eos_id).astype(np.int64)
    first = [0] if tokens[0] != eos_id else []
    last = [len(tokens) - 1] if tokens[-1] != eos_id else []
    return np.concatenate([np.array(first, np.int64), starts, np.array(last, np.int64)])
