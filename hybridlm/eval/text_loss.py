"""Loss over whole documents with a sliding window: every token is predicted exactly once, from its own document alone.

A document is read as ``[eos] text``, its targets are ``text [eos]``: the first token is predicted from the separator. A
document longer than the window is read in windows ``stride`` tokens apart, and each window counts only the targets that
no earlier window did, so all but those of the first window see at least ``context - stride`` tokens. With
``stride = context`` the windows are adjacent, which is how ``data.packing`` cuts a document: with ``data.isolate`` the
sums are then those of the validation during training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch

from hybridlm.data.corpus import TextSplit
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.data.windows.order import IGNORE, spread
from hybridlm.data.windows.packing import document_starts
from hybridlm.errors import UserError
from hybridlm.eval.scoring import token_losses
from hybridlm.model.lm import HybridLM

Read = Callable[[int, int], np.ndarray]


def slide(lengths: np.ndarray, context: int, stride: int) -> np.ndarray:
    """Windows over documents of ``lengths`` (D,) pairs of input and target, as rows (document, first pair, pairs, pairs
    that do not count), (W, 4) int64. Each pair of a document counts in exactly one window. 1 <= stride <= context."""
    lengths = np.asarray(lengths, dtype=np.int64)
    counts = 1 + -(-np.maximum(lengths - context, 0) // stride)
    documents = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = number * stride
    sizes = np.minimum(lengths[documents] - first, context)
    skipped = np.where(number == 0, 0, context - stride)
    return np.stack([documents, first, sizes, skipped], axis=1)


class Documents:
    """Documents to evaluate, as the token ids between two separators."""

    def __init__(self, places: np.ndarray, tokens: Read, learned: Read) -> None:
        """places: (D, 2) int64, the position of the separator before each document and its pairs of input and target.
        tokens and learned: of (position, count), the ids and which of them count as targets."""
        self.places, self._tokens, self._learned = places, tokens, learned

    @staticmethod
    def of_split(split: TextSplit, eos_id: int, limit: int | None = None) -> Documents:
        """All documents of a split, or ``limit`` of them spread evenly over it. UserError: there is none."""
        stream, found = split.stream, list[np.ndarray]()
        for piece, begin in zip(stream.pieces, stream.firsts.tolist(), strict=False):
            starts = piece.starts()
            starts = document_starts(piece.tokens(), eos_id) if starts is None else np.asarray(starts, dtype=np.int64)
            found.append(np.stack([begin + starts[:-1], np.diff(starts)], axis=1))
        places = np.concatenate(found)
        if limit is not None and limit < len(places):
            places = places[spread(np.arange(limit), limit, len(places))]
        if not len(places):
            raise UserError("the text contains no document to evaluate")
        return Documents(places, stream.read, stream.read_learned)

    @staticmethod
    def of_text(text: str, tokenizer: Tokenizer) -> Documents:
        """One document."""
        ids = np.array([tokenizer.eos_id, *tokenizer.encode(text), tokenizer.eos_id], dtype=np.int64)
        return Documents(
            np.array([[0, len(ids) - 1]]),
            lambda first, count: ids[first : first + count],
            lambda first, count: np.ones(count, dtype=bool),
        )

    def batches(self, context: int, stride: int, batch: int) -> list[np.ndarray]:
        """The windows, ``batch`` at a time and the longest first, for ``read``."""
        windows = slide(self.places[:, 1], context, stride)
        windows = windows[np.argsort(-windows[:, 2], kind="stable")]
        return np.split(windows, range(batch, len(windows), batch))

    def read(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ids and targets (B, T) int64 of some windows, the longest of which is first; shorter rows are padded on the
        right, where no target counts."""
        shape = (len(windows), int(windows[0, 2]))
        ids, targets = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORE, dtype=np.int64)
        for row, (document, first, size, skipped) in enumerate(windows.tolist()):
            place = int(self.places[document, 0]) + first
            tokens, counted = self._tokens(place, size + 1), self._learned(place + 1, size)
            counted[:skipped] = False
            ids[row, :size] = tokens[:-1]
            targets[row, :size][counted] = tokens[1:][counted]
        return ids, targets


class TextLoss:
    """Sums over the targets of a text, by the number of tokens before them in their window."""

    def __init__(self, token_bytes: np.ndarray, documents: int) -> None:
        """token_bytes: (V,) bytes of text of each id. documents: how many are measured."""
        self._token_bytes = token_bytes
        self.documents, self.text_bytes, self.correct = documents, 0, 0
        self.nats, self.tokens = np.zeros(0), np.zeros(0, dtype=np.int64)  # (T,), T the longest window so far

    def add(self, model: HybridLM, ids: np.ndarray, targets: np.ndarray) -> None:
        """Measures a batch of windows, ids and targets (B, T)."""
        losses, likeliest = token_losses(model, torch.from_numpy(ids), torch.from_numpy(targets))
        counted = targets != IGNORE
        self._accumulate(losses.numpy().sum(0), counted.sum(0))
        self.correct += int(likeliest.sum())
        self.text_bytes += int(self._token_bytes[targets[counted]].sum(dtype=np.int64))

    def merge(self, other: TextLoss) -> None:
        """Adds the sums of another text."""
        self._accumulate(other.nats, other.tokens)
        self.documents, self.text_bytes = self.documents + other.documents, self.text_bytes + other.text_bytes
        self.correct += other.correct

    def _accumulate(self, nats: np.ndarray, tokens: np.ndarray) -> None:
        missing = (0, max(0, len(nats) - len(self.nats)))
        self.nats, self.tokens = np.pad(self.nats, missing), np.pad(self.tokens, missing)
        self.nats[: len(nats)] += nats
        self.tokens[: len(tokens)] += tokens

    def metrics(self) -> dict[str, float]:
        """loss (nats per token), ppl, accuracy, bpb (only if there are bytes), and the counts. UserError: no target
        counts."""
        tokens, nats = int(self.tokens.sum()), float(self.nats.sum())
        if not tokens:
            raise UserError("the text contains no token to predict")
        found = {"loss": nats / tokens, "ppl": math.exp(min(nats / tokens, 700.0)), "accuracy": self.correct / tokens}
        if self.text_bytes:
            found["bpb"] = nats / math.log(2) / self.text_bytes
        return found | {"tokens": tokens, "bytes": self.text_bytes, "documents": self.documents}

    def curve(self) -> list[dict[str, float]]:
        """Loss by position in powers of two: targets with 1, 2, 3-4, 5-8, ... tokens before them, the separator
        included."""
        rows: list[dict[str, float]] = []
        first = 0
        while first < len(self.tokens):
            last = min(max(1, 2 * first), len(self.tokens))
            if tokens := int(self.tokens[first:last].sum()):
                loss = float(self.nats[first:last].sum()) / tokens
                rows.append({"first": first + 1, "last": last, "loss": loss, "tokens": tokens})
            first = last
        return rows


def text_loss(
    model: HybridLM,
    documents: Documents,
    token_bytes: np.ndarray,
    context: int,
    *,
    stride: int | None = None,
    batch: int = 8,
    progress: Callable[[list[np.ndarray]], Iterable[np.ndarray]] = iter,
) -> TextLoss:
    """The loss of ``model``, in evaluation mode, over ``documents``.

    token_bytes: (V,) bytes of text of each id (``Tokenizer.token_bytes``). context: tokens of a window; stride: tokens
    from window to window, at most ``context`` (None: half of it); batch: windows at a time. progress: wraps the loop
    over the batches.
    """
    found = TextLoss(token_bytes, len(documents.places))
    for windows in progress(documents.batches(context, stride or max(1, context // 2), batch)):
        found.add(model, *documents.read(windows))
    return found
