"""Searches micro-batch, accumulation, activation checkpointing and logits chunk for the fastest step that fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hybridlm.memory.microbatch import MicrobatchMemory, trace_microbatch
from hybridlm.memory.optimizer import OptimizerMemory
from hybridlm.memory.speed import relative_time
from hybridlm.memory.timeline import DeviceShare, Peak, StepSettings, compose
from hybridlm.memory.workload import Workload
from hybridlm.model.lm import HybridLM
from hybridlm.ops.cross_entropy import ROWS

FEW_ROWS = 128
_ROUGHLY = 1.1  # times the lower bound of a step's memory
_EVERY = (0, 8, 6, 4, 3, 2, 1)  # values of checkpoint_blocks that are tried


@dataclass(frozen=True)
class MemoryLimit:
    """bytes: available, None: unknown. The allocator reserves ``peak x (1 + margin) + spare``."""

    bytes: int | None
    margin: float
    spare: int

    def reserved(self, peak: int) -> int:
        return int(peak * (1 + self.margin)) + self.spare

    def holds(self, peak: int) -> bool:
        return self.bytes is None or self.reserved(peak) <= self.bytes


@dataclass(frozen=True)
class StepModel:
    """Memory and relative time of a step, for any settings of it."""

    work: Workload
    model: HybridLM  # on "meta", for its FLOPs
    update: OptimizerMemory
    shares: DeviceShare

    def peak(self, step: StepSettings) -> Peak:
        """The step's peak, from a trace of its own micro-batch size."""
        again = self._followed(step, checkpointed=True) if step.checkpoint_blocks else None
        plain = again if again is not None and step.checkpoint_blocks == 1 else self._followed(step, checkpointed=False)
        return compose(self.work.layers, (plain, again or plain), self.update, step, self.shares)

    @property
    def outside(self) -> int:
        """Bytes at the optimizer's peak, whatever the settings."""
        stays = self.update.weights + self.update.gradients + self.update.state
        return stays // self.shares.sharded + self.shares.exchange + self.shares.libraries + self.update.transient

    def at_least(self, step: StepSettings) -> int:
        """A lower bound of ``peak``, from micro-batches of one and two sequences: the peak is a maximum of straight
        lines in the micro-batch size, so it lies above the line through two of its points."""
        one, two = (
            self.peak(StepSettings(size, max(2, step.accumulate), step.checkpoint_blocks, step.rows)).bytes
            for size in (1, 2)
        )
        return one + (two - one) * (step.batch_size - 1)

    def time(self, step: StepSettings) -> float:
        return relative_time(self.model, self.work, step)

    def _followed(self, step: StepSettings, *, checkpointed: bool) -> MicrobatchMemory:
        return trace_microbatch(
            self.work, step.batch_size, checkpointed=checkpointed, accumulating=step.accumulate > 1, rows=step.rows
        )


def choose(steps: StepModel, options: Sequence[StepSettings], limit: MemoryLimit) -> tuple[StepSettings, Peak, bool]:
    """The fastest of ``options`` that fits, its peak and True; if none does, the smallest and False."""
    smallest, chosen = smallest_step(options), None
    if limit.holds(steps.outside):
        for rows in sorted({step.rows for step in options}, reverse=True):
            chosen = _fastest(steps, [step for step in options if step.rows == rows], limit, chosen) or chosen
    return (smallest, steps.peak(smallest), False) if chosen is None else (*chosen, True)


def roughly(steps: StepModel, options: Sequence[StepSettings], limit: MemoryLimit) -> tuple[StepSettings, int] | None:
    """About the largest micro-batch that fits with the checkpointing and rows of the smallest option, and the smallest
    option's bytes; None: not even that fits. ``choose`` takes longer and finds faster options."""
    smallest = smallest_step(options)
    if not limit.holds(steps.outside) or not limit.holds(least := steps.peak(smallest).bytes):
        return None
    like = [
        step for step in options if (step.checkpoint_blocks, step.rows) == (smallest.checkpoint_blocks, smallest.rows)
    ]
    held = [step for step in like if step == smallest or limit.holds(int(_ROUGHLY * steps.at_least(step)))]
    return max(held, key=lambda step: step.batch_size), least


def _fastest(
    steps: StepModel, options: Sequence[StepSettings], limit: MemoryLimit, known: tuple[StepSettings, Peak] | None
) -> tuple[StepSettings, Peak] | None:
    """The fastest of options with the same rows that fits, if it is faster than ``known``."""
    first, *others = sorted(options, key=lambda step: (steps.time(step), step.accumulate))
    if known is None:
        peak = steps.peak(first)
        if limit.holds(peak.bytes):
            return first, peak
        if not limit.holds(steps.peak(smallest_step(options)).bytes):
            return None
    else:
        others = [step for step in (first, *others) if steps.time(step) < steps.time(known[0])]
    for step in others:
        if step.accumulate == 1 or limit.holds(steps.at_least(step)):
            peak = steps.peak(step)
            if limit.holds(peak.bytes):
                return step, peak
    return None


def smallest_step(options: Sequence[StepSettings]) -> StepSettings:
    """The option that needs the least memory."""
    return min(
        options, key=lambda step: (step.batch_size, step.checkpoint_blocks != 1, step.checkpoint_blocks == 0, step.rows)
    )


def possible_settings(
    windows: int,
    layers: int,
    batch_size: int | str,
    accumulate: int | str,
    checkpoint_blocks: int | str,
    rows: int | str,
) -> list[StepSettings]:
    """All settings for ``windows`` sequences per process and step that the user's own leave open."""
    sizes = [size for size in range(1, windows + 1) if windows % size == 0]
    if isinstance(batch_size, int):
        sizes = [batch_size]
    elif isinstance(accumulate, int):
        sizes = [windows // accumulate]
    every = [n for n in _EVERY if n <= layers] if checkpoint_blocks == "auto" else [int(checkpoint_blocks)]
    some = [ROWS, FEW_ROWS] if rows == "auto" else [int(rows)]
    return [StepSettings(size, windows // size, n, count) for size in sizes for n in every for count in some]
