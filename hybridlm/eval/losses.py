"""Losses of single tokens; from them log-likelihoods of continuations, accuracy on a synthetic task, counted as the
validation during training counts it, and the loss over whole documents with a sliding window: every token is predicted
exactly once, from its own document alone.

A document is read as ``[eos] text``, its targets are ``text [eos]``: the first token is predicted from the separator. A
document longer than the window is read in windows ``stride`` tokens apart, and each window counts only the targets that
no earlier window did, so all but those of the first window see at least ``context - stride`` tokens. With
``stride = context`` the windows are adjacent, which is how ``data.packing`` cuts a document: with ``data.isolate`` the
sums are then those of the validation during training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from hybridlm.data.corpus import TextSplit
from hybridlm.data.synthetic.source import GeneratedWindows
from hybridlm.data.windows.order import IGNORE, spread
from hybridlm.data.windows.packing import document_starts
from hybridlm.errors import UserError
from hybridlm.model.lm import HybridLM

_BUCKETS = 64  # of positions, in powers of two


@torch.no_grad()
def token_losses(model: HybridLM, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each target in nats, float64 and 0 where the target is ignored (-100), and whether the target is the most
    likely id, False where ignored; both (B, T) on the CPU.

    ids, targets: (B, T). The model is in evaluation mode.
    """
    device = model.embedding.weight.device
    output = model(ids.to(device), targets=targets.to(device), each=True)
    return output.losses.double().cpu(), output.likeliest.cpu() & (targets != IGNORE)


class Continuation(NamedTuple):
    """ids: context and continuation, at least one id; length: ids of the continuation, fewer than all."""

    ids: tuple[int, ...]
    length: int


def loglikelihoods(model: HybridLM, requests: Sequence[Continuation], batch: int) -> list[tuple[float, bool]]:
    """For each request the log-likelihood of its continuation in nats, and whether greedy decoding produces it. Equal
    requests are computed once, in batches of similar length."""
    unique = sorted(set(requests), key=lambda request: (-len(request.ids), request))
    scores: dict[Continuation, tuple[float, bool]] = {}
    for first in range(0, len(unique), batch):
        some = unique[first : first + batch]
        scores |= zip(some, _batched(model, some), strict=True)
    return [scores[request] for request in requests]


def _batched(model: HybridLM, requests: Sequence[Continuation]) -> list[tuple[float, bool]]:
    """One forward; shorter rows are padded on the right, which no token attends to."""
    longest = max(1, *(len(request.ids) - 1 for request in requests))
    ids = torch.zeros(len(requests), longest, dtype=torch.long)
    targets = torch.full_like(ids, IGNORE)
    for row, (tokens, length) in enumerate(requests):
        end = len(tokens) - 1
        ids[row, :end] = torch.tensor(tokens[:-1], dtype=torch.long)
        targets[row, end - length : end] = torch.tensor(tokens[len(tokens) - length :], dtype=torch.long)
    losses, likeliest = token_losses(model, ids, targets)
    greedy = (likeliest | (targets == IGNORE)).all(1)
    return list(zip((-losses.sum(1)).tolist(), greedy.tolist(), strict=True))


def synthetic_metrics(model: HybridLM, windows: GeneratedWindows, batch: int, limit: int | None) -> dict[str, float]:
    """loss: nats per answer; accuracy: share of correct answers; exact: share of examples with all answers correct.
    limit: examples at most."""
    examples = min(windows.numbers, limit or windows.numbers)
    sums = np.zeros(4)  # nats, correct answers, answers, examples with all answers correct
    for chosen in np.split(np.arange(examples), range(batch, examples, batch)):
        rows = windows.rows(chosen)
        targets = torch.from_numpy(rows.targets)
        losses, likeliest = token_losses(model, torch.from_numpy(rows.ids), targets)
        ignored = targets == IGNORE
        exact = (likeliest | ignored).all(1)
        sums += [float(part.sum()) for part in (losses, likeliest, ~ignored, exact)]
    nats, correct, answers, right = sums.tolist()
    metrics = {"loss": nats / answers, "accuracy": correct / answers, "exact": right / examples}
    return metrics | {"answers": int(answers), "examples": examples}


def slide(lengths: np.ndarray, context: int, stride: int) -> np.ndarray:
    """Windows over documents of ``lengths`` (D,) pairs of input and target, as rows (document, first pair, pairs, pairs
    that do not count), (W, 4) int64. Each pair of a document counts in exactly one window. 1 <= stride <= context."""
    counts = 1 + -(-np.maximum(lengths - context, 0) // stride)
    documents = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
    sizes = np.minimum(lengths[documents] - number * stride, context)
    return np.stack([documents, number * stride, sizes, np.where(number == 0, 0, context - stride)], axis=1)


class Documents:
    """Documents to evaluate, as the token ids between two separators. places: (D, 2) int64, the position of the
    separator before each document and its pairs of input and target."""

    def __init__(self, split: TextSplit, eos_id: int, limit: int | None = None) -> None:
        """All documents of a split, or ``limit`` of them spread evenly over it. UserError: there is none."""
        self.stream, found = split.stream, list[np.ndarray]()
        for piece, begin in zip(self.stream.pieces, self.stream.firsts.tolist(), strict=False):
            starts = piece.starts()
            starts = document_starts(piece.tokens(), eos_id) if starts is None else np.asarray(starts, dtype=np.int64)
            found.append(np.stack([begin + starts[:-1], np.diff(starts)], axis=1))
        self.places = np.concatenate(found)
        if limit is not None and limit < len(self.places):
            self.places = self.places[spread(np.arange(limit), limit, len(self.places))]
        if not len(self.places):
            raise UserError("the text contains no document to evaluate")

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
            tokens, counted = self.stream.read(place, size + 1), self.stream.read_learned(place + 1, size)
            counted[:skipped] = False
            ids[row, :size] = tokens[:-1]
            targets[row, :size][counted] = tokens[1:][counted]
        return ids, targets


@dataclass
class TextLoss:
    """Sums over the targets of a text. nats, tokens: by the tokens before a target in its window, in powers of two: 1,
    2, 3-4, 5-8, ...; longest: tokens of the longest window."""

    documents: int = 0
    text_bytes: int = 0
    correct: int = 0
    longest: int = 0
    nats: np.ndarray = field(default_factory=lambda: np.zeros(_BUCKETS))
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(_BUCKETS, dtype=np.int64))

    def merge(self, other: TextLoss) -> None:
        """Adds the sums of another text."""
        self.documents, self.text_bytes = self.documents + other.documents, self.text_bytes + other.text_bytes
        self.correct, self.longest = self.correct + other.correct, max(self.longest, other.longest)
        self.nats, self.tokens = self.nats + other.nats, self.tokens + other.tokens

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
        """Loss by position: targets with ``first`` to ``last`` tokens before them, the separator included."""
        return [
            {
                "first": (2**bucket >> 1) + 1,
                "last": min(2**bucket, self.longest),
                "loss": float(self.nats[bucket]) / int(self.tokens[bucket]),
                "tokens": int(self.tokens[bucket]),
            }
            for bucket in np.flatnonzero(self.tokens).tolist()
        ]


def text_loss(
    model: HybridLM,
    documents: Documents,
    token_bytes: np.ndarray,
    context: int,
    *,
    stride: int,
    batch: int,
    label: str = "",
) -> TextLoss:
    """The loss of ``model``, in evaluation mode, over ``documents``.

    token_bytes: (V,) bytes of text of each id (``Tokenizer.token_bytes``). context: tokens of a window; stride: tokens
    from window to window, at most ``context``; batch: windows at a time; label: of the progress bar on a terminal.
    """
    found, batches, console = (
        TextLoss(len(documents.places)),
        documents.batches(context, stride, batch),
        Console(stderr=True),
    )
    for windows in track(batches, label, console=console, transient=True, disable=not console.is_terminal):
        ids, targets = documents.read(windows)
        losses, likeliest = token_losses(model, torch.from_numpy(ids), torch.from_numpy(targets))
        counted, bucket = targets != IGNORE, np.frexp(np.arange(ids.shape[1]))[1]
        found.nats += np.bincount(bucket, losses.numpy().sum(0), _BUCKETS)
        found.tokens += np.bincount(bucket, counted.sum(0), _BUCKETS).astype(np.int64)
        found.correct += int(likeliest.sum())
        found.text_bytes += int(token_bytes[targets[counted]].sum(dtype=np.int64))
        found.longest = max(found.longest, ids.shape[1])
    return found
