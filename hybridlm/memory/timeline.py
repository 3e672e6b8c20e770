"""Composes the memory of a whole step from its traced parts, and finds the peak."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hybridlm.config.layers import LayerSpec
from hybridlm.memory.microbatch import ForwardBackward, MicrobatchMemory
from hybridlm.memory.optimizer import OptimizerMemory

WEIGHTS, GRADIENTS, OPTIMIZER, AVERAGE, BATCH = "weights", "gradients", "optimizer", "running average", "micro-batches"
EXCHANGE, LIBRARIES, LOSS, WORKSPACE, ACTIVATIONS = "exchange", "cuBLAS", "loss", "workspace", "activations, "


@dataclass(frozen=True)
class StepSettings:
    """How a step is split up. checkpoint_blocks: every so-many-th layer uses activation checkpointing, 0: none; rows:
    of logits that the loss computes at once."""

    batch_size: int
    accumulate: int
    checkpoint_blocks: int
    rows: int


@dataclass(frozen=True)
class DeviceShare:
    """How one device's memory differs from a single-device run. sharded: over how many devices weights, gradients and
    optimizer state are sharded; exchange: bytes of DDP's or FSDP2's buffers; libraries: bytes of cuBLAS; averaged: a
    running average is kept."""

    sharded: int
    exchange: int
    libraries: int
    averaged: bool


@dataclass(frozen=True)
class Peak:
    """The most bytes of a step, and by what they are held then, in the order of the constants above."""

    bytes: int
    parts: dict[str, int]
    moment: str


class _Timeline:
    """Memory over the course of a step, by what holds it."""

    def __init__(self, held: dict[str, int]) -> None:
        self.held = Counter(held)
        self.best = Peak(0, {}, "")

    def at(self, above: int, moment: str) -> None:
        level = sum(self.held.values()) + above
        if level > self.best.bytes:
            parts = {**self.held, WORKSPACE: self.held[WORKSPACE] + above}
            self.best = Peak(level, {name: size for name, size in parts.items() if size}, moment)


def compose(
    layers: tuple[LayerSpec, ...],
    pieces: tuple[MicrobatchMemory, MicrobatchMemory],
    update: OptimizerMemory,
    step: StepSettings,
    shares: DeviceShare,
) -> Peak:
    """The peak of a step after the first: the previous step's gradients are held until the first backward.

    pieces: without and with activation checkpointing, both with ``step``'s micro-batch and rows.
    """
    plain, again = pieces
    over, every = shares.sharded, step.checkpoint_blocks
    chosen: list[tuple[str, ForwardBackward]] = []
    seen: set[LayerSpec] = set()
    for i, spec in enumerate(layers):
        source = again if every and i % every == 0 else plain
        chosen.append((ACTIVATIONS + spec.kind, source.blocks[spec][spec in seen]))
        seen.add(spec)
    course = _Timeline(
        {
            WEIGHTS: update.weights // over,
            GRADIENTS: update.gradients // over,
            OPTIMIZER: update.state // over,
            AVERAGE: update.average if shares.averaged else 0,
            BATCH: plain.batch * step.accumulate,
            EXCHANGE: shares.exchange,
            LIBRARIES: shares.libraries,
        }
    )
    every_piece = [(LOSS, plain.embedding), *chosen, (LOSS, plain.head)]
    for name, piece in every_piece:
        course.at(piece.forward.peak, f"forward, {name.removeprefix(ACTIVATIONS)}")
        course.held[name] += piece.forward.net
    fresh = step.accumulate == 1
    if fresh:
        course.held[GRADIENTS] = 0
    for name, piece in reversed(every_piece):
        course.at(piece.backward.peak, f"backward, {name.removeprefix(ACTIVATIONS)}")
        made = piece.gradients if fresh else 0
        course.held[name] -= piece.forward.net
        course.held[WORKSPACE] += (
            piece.forward.net + piece.backward.net - made
        )  # the gradient of the residual stream, above all
        course.held[GRADIENTS] += made // over
    course.held[WORKSPACE] = 0
    course.at(update.transient, "optimizer")
    if shares.averaged:
        course.at(update.average_transient, "running average")
    return course.best
