"""A corpus that is ready for training."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hybridlm.data.files.stream import TokenStream
from hybridlm.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextSplit:
    """The training or the validation documents of a corpus as tokens.

    text_bytes: UTF-8 bytes of text, in conversations of the learned tokens only. gzip_bytes, xz_bytes: of that text
    compressed, the yardstick for bits per byte; None if not measured. reference: of preferences, (pairs that fit into a
    window, 2) float64, the log-probabilities of chosen and rejected under the weights that training starts from.
    """

    stream: TokenStream
    documents: int
    text_bytes: int
    gzip_bytes: int | None = None
    xz_bytes: int | None = None
    reference: np.ndarray | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Part:
    """One corpus of a mixture, or the only one. weight: its share of the training windows, over the sum of weights."""

    name: str
    weight: float
    train: TextSplit
    val: TextSplit
    folder: Path  # for derived data


@dataclass(frozen=True)
class Prepared:
    """Everything that training reads: the corpora, none where examples are generated, and their common tokenizer."""

    parts: tuple[Part, ...]
    tokenizer: Tokenizer
