"""Loss over whole documents: every token is predicted exactly once, from its own document alone, in windows that slide
over it.

A document is read as ``[eos] text``, its targets are ``text [eos]``: the first token is predicted from the separator. A
document longer than the window is read in windows ``stride`` apart, and of each only the targets that no window before
it had count, so all but those of the first window see at least ``context - stride`` tokens. With ``stride = context``
windows lie side by side, which are the pieces into which ``data.packing`` cuts a document: then, with ``data.isolate``,
the sums are those of the validation during training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hybridlm.data.corpus import TextSplit
from hybridlm.data.files.stream import TokenStream
from hybridlm.data.windows.order import IGNORE, spread
from hybridlm.data.windows.packing import document_starts
from hybridlm.errors import UserError
from hybridlm.model.lm import HybridLM


def slide(lengths: np.ndarray, context: int, stride: int) -> np.ndarray:
    """Windows over documents of ``lengths`` (D,) pairs of input and target, as rows (document, first pair, pairs, pairs
    that do not count), (W, 4) int64. Of every document each pair counts in exactly one window. 1 <= stride <=
    context."""
    lengths = np.asarray(lengths, dtype=np.int64)
    counts = 1 + -(-np.maximum(lengths - context, 0) // stride)
    documents = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = number * stride
    sizes = np.minimum(lengths[documents] - first, context)
    skipped = np.where(number == 0, 0, context - stride)
    return np.stack([documents, first, sizes, skipped], axis=1)


@dataclass(frozen=True)
class Bucket:
    """Targets that stand behind ``first`` to ``last`` tokens of their document (the separator counts as one) in their
    window."""

    first: int
    last: int
    nats: float
    tokens: int

    @property
    def loss(self) -> float:
        return self.nats / self.tokens


@dataclass(frozen=True)
class TextLoss:
    """nats: summed over ``tokens`` targets, which stand for ``text_bytes`` bytes; curve: the same by the tokens before
    the target."""

    documents: int
    tokens: int
    text_bytes: int
    nats: float
    correct: int  # targets that were the likeliest id
    curve: tuple[Bucket, ...]

    def metrics(self) -> dict[str, float]:
        """Flat figures for eval.json; bits per byte only where there are bytes."""
        loss = self.nats / self.tokens
        found = {"loss": loss, "ppl": math.exp(min(loss, 700.0)), "accuracy": self.correct / self.tokens}
        if self.text_bytes:
            found["bpb"] = self.nats / math.log(2) / self.text_bytes
        return found | {"tokens": self.tokens, "bytes": self.text_bytes, "documents": self.documents}


def joined(parts: Sequence[TextLoss]) -> TextLoss:
    """Of several texts together, measured with the same window."""
    curves: dict[tuple[int, int], list[Bucket]] = {}
    for part in parts:
        for bucket in part.curve:
            curves.setdefault((bucket.first, bucket.last), []).append(bucket)
    curve = [
        Bucket(first, last, sum(one.nats for one in same), sum(one.tokens for one in same))
        for (first, last), same in sorted(curves.items())
    ]
    sums = [
        sum(getattr(part, name) for part in parts) for name in ("documents", "tokens", "text_bytes", "nats", "correct")
    ]
    return TextLoss(*sums, curve=tuple(curve))


class Documents:
    """Documents of a split, evenly spread over it where only some are wanted."""

    def __init__(self, split: TextSplit, eos_id: int, limit: int | None = None) -> None:
        """limit: documents at most. ConfigError: there is none."""
        self.stream: TokenStream = split.stream
        found: list[np.ndarray] = []  # rows (place of the eos before it, pairs)
        for piece, begin in zip(self.stream.pieces, self.stream.firsts.tolist(), strict=False):
            starts = piece.starts()
            starts = document_starts(piece.tokens(), eos_id) if starts is None else np.asarray(starts, dtype=np.int64)
            found.append(np.stack([begin + starts[:-1], np.diff(starts)], axis=1))
        self.places = np.concatenate(found)
        if limit is not None and limit < len(self.places):
            self.places = self.places[spread(np.arange(limit), limit, len(self.places))]
        if not len(self.places):
            raise UserError("the text holds no document to evaluate on")

    def __len__(self) -> int:
        return len(self.places)

    @property
    def longest(self) -> int:
        """Pairs of input and target of the longest document."""
        return int(self.places[:, 1].max())

    def batches(self, context: int, stride: int, batch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """``ids`` and ``targets`` (rows, T) int64, the longest windows first; rows are filled up at the right, where no
        target counts."""
        windows = slide(self.places[:, 1], context, stride)
        windows = windows[np.argsort(-windows[:, 2], kind="stable")]
        for chosen in np.split(windows, range(batch, len(windows), batch)):
            longest = int(chosen[0, 2])
            ids, targets = (
                np.zeros((len(chosen), longest), dtype=np.int64),
                np.full((len(chosen), longest), IGNORE, dtype=np.int64),
            )
            for row, (document, first, size, skipped) in enumerate(chosen.tolist()):
                place = int(self.places[document, 0]) + first
                tokens = self.stream.read(place, size + 1)
                ids[row, :size] = tokens[:-1]
                counted = self.stream.read_learned(place + 1, size)
                counted[:skipped] = False
                targets[row, :size][counted] = tokens[1:][counted]
            yield ids, targets

    def count(self, context: int, stride: int, batch: int) -> int:
        """How many batches there are."""
        return -(-len(slide(self.places[:, 1], context, stride)) // batch)


class TextMeter:
    """Adds up batches of windows of at most ``context`` columns into a ``TextLoss``."""

    def __init__(self, model: HybridLM, token_bytes: np.ndarray, context: int) -> None:
        """token_bytes: (V,) bytes of text per id."""
        self._model, self._bytes = model, torch.from_numpy(token_bytes.astype(np.int64))
        self._nats = torch.zeros(context, dtype=torch.float64)
        self._tokens, self._correct = torch.zeros(context, dtype=torch.long), 0
        self._text_bytes = 0

    @torch.inference_mode()
    def add(self, ids: Tensor, targets: Tensor) -> None:
        """ids, targets: (B, T)."""
        device = self._model.embedding.weight.device
        output = self._model(ids.to(device), targets=targets.to(device), each=True)
        counted, length = targets != IGNORE, targets.shape[1]
        self._nats[:length] += output.losses.double().cpu().sum(0)
        self._tokens[:length] += counted.sum(0)
        self._correct += int((output.likeliest.cpu() & counted).sum())
        self._text_bytes += int(self._bytes[targets[counted]].sum())

    def result(self, documents: int) -> TextLoss:
        """ConfigError: no target counts."""
        tokens = int(self._tokens.sum())
        if not tokens:
            raise UserError("the text holds nothing to predict")
        return TextLoss(
            documents, tokens, self._text_bytes, float(self._nats.sum()), self._correct, tuple(self._buckets())
        )

    def _buckets(self) -> Iterator[Bucket]:
        """By powers of two: 1, 2, 3-4, 5-8, ... tokens before the target."""
        first = 0
        while first < len(self._tokens):
            last = min(max(1, 2 * first), len(self._tokens))
            if tokens := int(self._tokens[first:last].sum()):
                yield Bucket(first + 1, last, float(self._nats[first:last].sum()), tokens)
            first = last
