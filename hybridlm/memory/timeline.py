"""The pieces of a step put together: how much memory is held at each border, and where the most is."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hybridlm.config.layers import LayerSpec
from hybridlm.memory.microbatch import Both, Pieces, Segment
from hybridlm.memory.updates import Update

WEIGHTS, GRADIENTS, OPTIMIZER, AVERAGE, BATCH = "weights", "gradients", "optimizer", "running average", "micro-batches"
EXCHANGE, LIBRARIES, LOSS, WORKSPACE, ACTIVATIONS = "exchange", "cuBLAS", "loss", "workspace", "activations, "


@dataclass(frozen=True)
class Cut:
    """How a step is cut. checkpoint_blocks: one layer in so many is computed again, 0: none; rows: of logits at once in
    the loss."""

    batch_size: int
    accumulate: int
    checkpoint_blocks: int
    rows: int


@dataclass(frozen=True)
class Shares:
    """What devices do to the bytes of one. sharded: weights, gradients and state are cut over so many; exchange:
    buffers of DDP or FSDP2; libraries: of cuBLAS; averaged: a running average is kept."""

    sharded: int
    exchange: int
    libraries: int
    averaged: bool


@dataclass(frozen=True)
class Peak:
    """The most bytes of a step and what holds them then, in the order of the constants above."""

    bytes: int
    parts: dict[str, int]
    moment: str


class _Course:
    """Memory as the step goes on, by what holds it."""

    def __init__(self, held: dict[str, int]) -> None:
        self.held = Counter(held)
        self.best = Peak(0, {}, "")

    def through(self, piece: Segment, moment: str) -> None:
        self.at(piece.peak, moment)

    def at(self, above: int, moment: str) -> None:
        level = sum(self.held.values()) + above
        if level > self.best.bytes:
            parts = {**self.held, WORKSPACE: self.held[WORKSPACE] + above}
            self.best = Peak(level, {name: size for name, size in parts.items() if size}, moment)


def compose(
    layers: tuple[LayerSpec, ...], pieces: tuple[Pieces, Pieces], update: Update, cut: Cut, shares: Shares
) -> Peak:
    """The peak of a step in a run that is under way: the gradients of the step before are there until the first
    backward.

    pieces: of plain layers and of checkpointed ones, both with ``cut``'s micro-batch and rows.
    """
    plain, again = pieces
    over, every = shares.sharded, cut.checkpoint_blocks
    chosen: list[tuple[str, Both]] = []
    seen: set[LayerSpec] = set()
    for i, spec in enumerate(layers):
        source = again if every and i % every == 0 else plain
        chosen.append((ACTIVATIONS + spec.kind, source.blocks[spec][spec in seen]))
        seen.add(spec)
    course = _Course(
        {
            WEIGHTS: update.weights // over,
            GRADIENTS: update.gradients // over,
            OPTIMIZER: update.state // over,
            AVERAGE: update.average if shares.averaged else 0,
            BATCH: plain.batch * cut.accumulate,
            EXCHANGE: shares.exchange,
            LIBRARIES: shares.libraries,
        }
    )
    every_piece = [(LOSS, plain.embedding), *chosen, (LOSS, plain.head)]
    for name, piece in every_piece:
        course.through(piece.forward, f"forward, {name.removeprefix(ACTIVATIONS)}")
        course.held[name] += piece.forward.net
    fresh = cut.accumulate == 1
    if fresh:
        course.held[GRADIENTS] = 0
    for name, piece in reversed(every_piece):
        course.through(piece.backward, f"backward, {name.removeprefix(ACTIVATIONS)}")
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
