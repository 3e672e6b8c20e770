"""Which way of cutting a step fits, at the least estimated time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hybridlm.memory.microbatch import Pieces, follow
from hybridlm.memory.speed import relative_time
from hybridlm.memory.timeline import Cut, Peak, Shares, compose
from hybridlm.memory.updates import Update
from hybridlm.memory.workload import Workload
from hybridlm.model.lm import HybridLM
from hybridlm.ops.cross_entropy import ROWS

FEW_ROWS = 128
_ROUGHLY = 1.1  # times the least that a cut can need
_EVERY = (0, 8, 6, 4, 3, 2, 1)  # what checkpoint_blocks may become


@dataclass(frozen=True)
class Limit:
    """bytes: what there is, None: unknown. margin, spare: what the allocator takes besides is ``peak x margin +
    spare``."""

    bytes: int | None
    margin: float
    spare: int

    def reserved(self, peak: int) -> int:
        return int(peak * (1 + self.margin)) + self.spare

    def holds(self, peak: int) -> bool:
        return self.bytes is None or self.reserved(peak) <= self.bytes


@dataclass(frozen=True)
class Steps:
    """Every way of cutting one step, and its memory."""

    work: Workload
    model: HybridLM  # on "meta", for its FLOPs
    update: Update
    shares: Shares

    def peak(self, cut: Cut) -> Peak:
        """The step's peak, from pieces of this very micro-batch."""
        again = self._followed(cut, checkpointed=True) if cut.checkpoint_blocks else None
        plain = again if again is not None and cut.checkpoint_blocks == 1 else self._followed(cut, checkpointed=False)
        return compose(self.work.layers, (plain, again or plain), self.update, cut, self.shares)

    @property
    def outside(self) -> int:
        """Bytes at the optimizer's peak, whatever the cut."""
        stays = self.update.weights + self.update.gradients + self.update.state
        return stays // self.shares.sharded + self.shares.exchange + self.shares.libraries + self.update.transient

    def at_least(self, cut: Cut) -> int:
        """Bytes that ``peak`` does not fall below, from micro-batches of one and two windows: it is a largest of
        straight lines in the micro-batch, so it lies above the line through two of its points."""
        one, two = (
            self.peak(Cut(size, max(2, cut.accumulate), cut.checkpoint_blocks, cut.rows)).bytes for size in (1, 2)
        )
        return one + (two - one) * (cut.batch_size - 1)

    def time(self, cut: Cut) -> float:
        return relative_time(self.model, self.work, cut)

    def _followed(self, cut: Cut, *, checkpointed: bool) -> Pieces:
        return follow(
            self.work, cut.batch_size, checkpointed=checkpointed, accumulating=cut.accumulate > 1, rows=cut.rows
        )


def choose(steps: Steps, cuts: Sequence[Cut], limit: Limit) -> tuple[Cut, Peak, bool]:
    """The fastest of ``cuts`` that fits, its peak and True; where none does, the smallest and False."""
    smallest, chosen = smallest_of(cuts), None
    if limit.holds(steps.outside):
        for rows in sorted({cut.rows for cut in cuts}, reverse=True):
            chosen = _fastest(steps, [cut for cut in cuts if cut.rows == rows], limit, chosen) or chosen
    return (smallest, steps.peak(smallest), False) if chosen is None else (*chosen, True)


def roughly(steps: Steps, cuts: Sequence[Cut], limit: Limit) -> tuple[Cut, int] | None:
    """About the largest micro-batch that fits with the layers and rows of the smallest cut, and the smallest cut's
    bytes; None: not even that fits. ``choose`` takes longer and finds faster cuts."""
    smallest = smallest_of(cuts)
    if not limit.holds(steps.outside) or not limit.holds(least := steps.peak(smallest).bytes):
        return None
    like = [cut for cut in cuts if (cut.checkpoint_blocks, cut.rows) == (smallest.checkpoint_blocks, smallest.rows)]
    held = [cut for cut in like if cut == smallest or limit.holds(int(_ROUGHLY * steps.at_least(cut)))]
    return max(held, key=lambda cut: cut.batch_size), least


def _fastest(
    steps: Steps, cuts: Sequence[Cut], limit: Limit, known: tuple[Cut, Peak] | None
) -> tuple[Cut, Peak] | None:
    """Of cuts with the same rows, if it is faster than what is known."""
    first, *others = sorted(cuts, key=lambda cut: (steps.time(cut), cut.accumulate))
    if known is None:
        peak = steps.peak(first)
        if limit.holds(peak.bytes):
            return first, peak
        if not limit.holds(steps.peak(smallest_of(cuts)).bytes):
            return None
    else:
        others = [cut for cut in (first, *others) if steps.time(cut) < steps.time(known[0])]
    for cut in others:
        if cut.accumulate == 1 or limit.holds(steps.at_least(cut)):
            peak = steps.peak(cut)
            if limit.holds(peak.bytes):
                return cut, peak
    return None


def smallest_of(cuts: Sequence[Cut]) -> Cut:
    """The cut that needs the least."""
    return min(cuts, key=lambda cut: (cut.batch_size, cut.checkpoint_blocks != 1, cut.checkpoint_blocks == 0, cut.rows))


def possible_cuts(
    windows: int,
    layers: int,
    batch_size: int | str,
    accumulate: int | str,
    checkpoint_blocks: int | str,
    rows: int | str,
) -> list[Cut]:
    """Every way to cut ``windows`` of one device that what the user fixed leaves open; few rows only where nothing else
    is left."""
    sizes = [size for size in range(1, windows + 1) if windows % size == 0]
    if isinstance(batch_size, int):
        sizes = [batch_size]
    elif isinstance(accumulate, int):
        sizes = [windows // accumulate]
    every = [n for n in _EVERY if n <= layers] if checkpoint_blocks == "auto" else [int(checkpoint_blocks)]
    some = [ROWS, FEW_ROWS] if rows == "auto" else [int(rows)]
    return [Cut(size, windows // size, n, count) for size in sizes for n in every for count in some]
