"""Document packing: which pieces of a token stream are in which training window of a fixed length.

The stream is ``[eos] doc [eos] doc ... [eos]`` (see ``bins``). A document as a training piece is the eos before it, its
text and the eos after it: one pair of input and target per token of the text and one more, so even an empty text gives
a pair.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, replace
from heapq import heappop, heappush

import numpy as np

from hybridlm.data.windows.order import IGNORE

_BLOCK = 1 << 24  # tokens that are searched at once
_PADDING = np.array([[0], [IGNORE], [-1]])  # of ids, targets and doc_ids


@dataclass(frozen=True, eq=False)  # == on arrays has no one answer
class Packing:
    """Windows of whole pieces, made by ``pack``; the arrays may be memory maps. A pair is an input token and its
    target, the token after it."""

    pieces: np.ndarray  # (P, 2) of integers: first token, number of pairs; grouped by window, in order within it
    windows: np.ndarray  # (W + 1,) of integers: window w holds pieces[windows[w] : windows[w + 1]], at least one
    targets: np.ndarray  # (W,) of integers: pairs of each window that are learned
    seq_len: int  # columns of a window

    def __len__(self) -> int:
        return len(self.windows) - 1

    @property
    def pairs(self) -> int:
        """Number of pairs in all windows, learned or not."""
        return int(self.pieces[:, 1].sum(dtype=np.int64))

    def fill(self, tokens: np.ndarray, learned: np.ndarray | None, w: int, rows: np.ndarray) -> None:
        """Write window ``w`` into ``rows`` (3, seq_len) int64: ids, targets, doc_ids. tokens: (N,), the stream;
        learned: (N,) bool, None: all.

        ``doc_ids`` numbers the window's pieces 0, 1, 2, ... from left to right. Padding is at the right end: ids 0,
        targets IGNORE, doc_ids -1. Pieces of one long document count as different documents: all but the last of them
        fill a window alone, so each is read without what came before it. IndexError: there is no such window.
        """
        if not 0 <= w < len(self):
            raise IndexError(f"window {w} of {len(self)}")
        begin, end = self.windows[w : w + 2].tolist()
        column = 0
        for number, (first, pairs) in enumerate(self.pieces[begin:end].tolist()):
            ids, targets, doc_ids = rows[:, column : column + pairs]
            ids[:], doc_ids[:] = tokens[first : first + pairs], number
            targets[:] = tokens[first + 1 : first + pairs + 1]
            if learned is not None:
                targets[~learned[first + 1 : first + pairs + 1]] = IGNORE
            column += pairs
        if column < self.seq_len:
            rows[:, column:] = _PADDING

    def counting(self, learned: np.ndarray) -> Packing:
        """The same windows, of which only the targets in ``learned`` (N,) bool count."""
        # The pieces leave no gap in the stream, so each ends where the next begins.
        in_order = np.argsort(self.pieces[:, 0])
        first = int(self.pieces[in_order[0], 0])
        edges = self.pieces[in_order, 0] - first
        counts = np.empty(len(self.pieces), dtype=np.int64)
        counts[in_order] = np.add.reduceat(learned[first + 1 : first + 1 + self.pairs], edges, dtype=np.int64)
        return replace(self, targets=np.add.reduceat(counts, self.windows[:-1]))


def document_starts(tokens: np.ndarray, eos_id: int) -> np.ndarray:
    """Positions of the end-of-text before each document and, last, after all of them: (documents + 1,) int64; fewer
    than two: no document.

    Text never contains that id, so it only separates documents. Other programs omit the first one or the last: then
    the first or last token takes its place.
    """
    blocks = [
        first + np.flatnonzero(tokens[first : first + _BLOCK] == eos_id) for first in range(0, len(tokens), _BLOCK)
    ]
    starts = np.concatenate([*blocks, np.zeros(0, np.int64)]).astype(np.int64)
    ends = [0, len(tokens) - 1] if len(tokens) else []
    return np.union1d(starts, np.array(ends, np.int64))


def pack(starts: np.ndarray, seq_len: int) -> Packing:
    """Best-fit decreasing (Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv 2404.10830).

    ``starts`` (D + 1,) of integers, increasing: the positions of the eos before each document and, last, of the closing
    eos; so document d gives starts[d + 1] - starts[d] pairs. Only a document of more than ``seq_len`` pairs is cut,
    into pieces of that many pairs and a rest: a piece's first input is the last target of the piece before, so no pair
    is lost. From the longest piece to the shortest, each goes whole into the window with the least room in which it
    fits, or into a new one if there is none.

    Of pieces of equal length the first in the stream comes first, of windows with equal room the one opened first is
    taken. Pieces within a window, and windows by their first piece, are in the order of the stream, so windows spread
    evenly over their numbers are spread evenly over the text. The same ``starts`` always give the same packing.

    Without a document there is no window. ValueError: ``starts`` do not increase or ``seq_len`` is below 1.
    """
    starts = np.asarray(starts, dtype=np.int64)
    if starts.size < 2:
        return Packing(np.zeros((0, 2), np.int64), np.zeros(1, np.int64), np.zeros(0, np.int64), seq_len)
    if seq_len < 1 or (np.diff(starts) < 1).any():
        raise ValueError(f"seq_len={seq_len} must be at least 1 and the starts of documents must increase")
    pieces = _cut(starts, seq_len)
    falling = np.argsort(-pieces[:, 1], kind="stable")
    opened = np.empty(len(pieces), dtype=np.int64)  # the window of each piece, numbered as they are opened
    opened[falling] = _best_fit(pieces[falling, 1], seq_len)
    _, first_pieces = np.unique(opened, return_index=True)
    numbers = np.empty_like(first_pieces)
    numbers[np.argsort(first_pieces)] = np.arange(len(first_pieces))
    window_of = numbers[opened]
    windows = np.concatenate([[0], np.cumsum(np.bincount(window_of))]).astype(np.int64)
    pieces = pieces[np.argsort(window_of, kind="stable")]
    # Correct only because no window is empty.
    return Packing(pieces, windows, np.add.reduceat(pieces[:, 1], windows[:-1]), seq_len)


def _cut(starts: np.ndarray, seq_len: int) -> np.ndarray:
    """All pieces (P, 2) int64, first token and number of pairs, in the order of the stream."""
    counts = -(-np.diff(starts) // seq_len)  # pieces of each document
    before = np.cumsum(counts) - counts  # pieces of all documents in front
    inside = np.arange(counts.sum()) - np.repeat(before, counts)  # number of the piece in its document
    firsts = np.repeat(starts[:-1], counts) + inside * seq_len
    return np.stack([firsts, np.diff(firsts, append=starts[-1])], axis=1)  # the pieces leave no gap


def _best_fit(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """Window (P,) int64 of each piece, numbered as they are opened; ``lengths`` (P,) int64 are decreasing."""
    window_of = np.arange(len(lengths))
    count = int((lengths == seq_len).sum())  # each of these fills a window, and they come first
    heaps: dict[int, list[int]] = {}  # the open windows by their room
    rooms: list[int] = []  # those that occur, in order
    shortest = int(lengths[-1])
    for place, length in enumerate(lengths[count:].tolist(), count):
        at = bisect_left(rooms, length)
        room = rooms[at] if at < len(rooms) else seq_len
        if at == len(rooms):
            window, count = count, count + 1
        else:
            window = heappop(heaps[room])
            if not heaps[room]:
                del heaps[room], rooms[at]
        window_of[place] = window
        left = room - length
        if left >= shortest:  # no piece fits into less
            if left not in heaps:
                heaps[left] = []
                insort(rooms, left)
            heappush(heaps[left], window)
    return window_of
