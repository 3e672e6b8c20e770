"""The rows that are decoded together: they join and leave between two tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hybridlm.generate.row import Row
from hybridlm.model.cache import ModelCache
from hybridlm.model.decoder import Decoder
from hybridlm.model.lm import HybridLM
from hybridlm.serve.prefixes import Node

_FIRST_ROWS = 4


@dataclass(eq=False)
class Job:
    """One answer, from the prompt to its last token.

    ids: the prompt's tokens, then the answer's; prompt: how many are the prompt's. marks: lengths of prefixes that
    other prompts may begin with. read: tokens in the cache, which is its own until it joins the batch. node: the
    longest kept prefix of what was read. reused: tokens of the prompt that did not have to be read. exact: its cache
    has the bits that depend on its tokens and ``cuts`` only. alone: it is being read once more, for that.
    """

    ids: list[int]
    row: Row
    node: Node
    marks: tuple[int, ...] = ()
    prompt: int = field(init=False)
    cancelled: bool = False
    cache: ModelCache | None = None
    read: int = 0
    reused: int = 0
    exact: bool = True
    alone: bool = False

    def __post_init__(self) -> None:
        self.prompt = len(self.ids)

    def cuts(self, chunk: int) -> list[int]:
        """Where the pieces end in which its tokens are read, ascending."""
        end = len(self.ids)
        return sorted({*range(chunk, end, chunk), *(mark for mark in self.marks if mark < end), self.prompt, end})


class Batch:
    """Rows of one cache, the first ones of which are in use; memory for more of them, and for more tokens, is allocated
    as it is needed."""

    def __init__(self, model: HybridLM, decoder: Decoder, room: int, context: int) -> None:
        """room: tokens per row that there is memory for at first; context: for how many there may be."""
        self.jobs: list[Job] = []
        self.room, self._context = room, context
        self._decoder = decoder
        self._rows, self._cache = _FIRST_ROWS, model.new_cache(_FIRST_ROWS, room)
        self._views: dict[tuple[int, int], ModelCache] = {}  # of rows that were decoded before

    def join(self, job: Job) -> None:
        """``job`` has been read but for its newest token."""
        assert job.cache is not None
        if len(self.jobs) == self._rows:
            double = torch.arange(2 * self._rows, device=self._cache.lengths.device) % self._rows
            self._rows, self._cache = 2 * self._rows, self._cache.select(double)
        self._grow(len(job.ids))
        job.cache.grow(self.room)
        self._cache.insert(len(self.jobs), job.cache)
        self.jobs.append(job)
        job.cache = None
        self._views.clear()

    def row(self, place: int) -> ModelCache:
        """The cache of one row, in the batch's memory."""
        return self._cache.view(place, 1)

    def leave(self, place: int) -> None:
        """The last row takes the place of one that leaves."""
        last = self.jobs.pop()
        if place < len(self.jobs):
            self._cache.insert(place, self.row(len(self.jobs)))
            self.jobs[place] = last
        self._views.clear()

    def logits(self, first: int, rows: int) -> Tensor:
        """(rows, V) after the newest token of the jobs from ``first`` on."""
        jobs = self.jobs[first : first + rows]
        needed = max(job.read for job in jobs) + 1
        if needed > self.room:
            self._grow(min(max(needed, self.room + self.room // 2), self._context))
        view = self._views.get((first, rows))
        if view is None:
            view = self._views[first, rows] = self._cache.view(first, rows)
        tokens = torch.tensor([job.ids[-1] for job in jobs], device=self._cache.lengths.device)
        logits = self._decoder(tokens, view)
        for job in jobs:
            job.read += 1
        return logits

    def _grow(self, room: int) -> None:
        if room > self.room:
            self._cache.grow(room)
            self.room = room
            self._views.clear()
