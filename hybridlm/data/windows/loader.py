"""Batches of windows for training and validation.

A batch is a dict of tensors: ``ids`` (B, T) int64, ``targets`` (B, T) int64 with -100 where nothing counts, and
``n_targets`` () int64, the number of targets that count. In training that is the number of the whole optimizer step
over all ranks and micro-batches, by which a sum of losses is divided; in validation it is this batch's own, and
``n_bytes`` () int64 is the number of bytes of text these targets stand for. Where packed documents are isolated there
is also ``doc_ids`` (B, T) int64, the document of each token within its row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated

import numpy as np
import torch
from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from hybridlm.data.windows.order import IGNORE, spread, step_positions
from hybridlm.data.windows.window_sources import Chain, Source, WindowBatch, Windows
from hybridlm.data.windows.workers import Ahead
from hybridlm.errors import ConfigError, UserError

Batch = dict[str, torch.Tensor]

_CHOSEN = 8192  # positions whose windows are chosen at once: one by one that would cost more than reading them
_COUNTED = 1024  # positions whose targets are counted at once


@dataclass(eq=False)  # == on arrays is ambiguous
class _MicroBatches:
    """One rank's micro-batches as a pure function of their index since the beginning of training; picklable."""

    source: Source
    global_batch: int
    micro_batch: int
    accumulate: int
    rank: int
    # Cached results with what they belong to: the block of steps, and the group of steps within it.
    _chosen: tuple[int, np.ndarray] = field(default=(-1, np.zeros(0, np.int64)))  # (steps, global_batch)
    _targets: tuple[int, int, np.ndarray] = field(default=(-1, -1, np.zeros(0, np.int64)))

    def __call__(self, index: int) -> Batch:
        step, micro = divmod(index, self.accumulate)
        block, inside = divmod(step, self._steps)
        if self._chosen[0] != block:
            positions = np.arange(
                block * self._steps * self.global_batch, (block + 1) * self._steps * self.global_batch, dtype=np.int64
            )
            self._chosen = (block, self.source.choose(positions).reshape(self._steps, self.global_batch))
        mine = step_positions(
            0,
            global_batch=self.global_batch,
            micro_batch=self.micro_batch,
            accumulate=self.accumulate,
            rank=self.rank,
            micro=micro,
        )
        batch = _tensors(self.source.rows(self._chosen[1][inside][mine]))
        # If a whole global batch has no target, its loss is 0 and not 0 / 0.
        return batch | {"n_targets": torch.tensor(max(1, self._targets_of(inside)))}

    @cached_property
    def _steps(self) -> int:
        """Steps of a block. At most a pass: for a source of a few windows many positions are many passes, each with its
        own keys."""
        return max(1, min(_CHOSEN, self.source.windows) // self.global_batch)

    def _targets_of(self, inside: int) -> int:
        """Targets in the whole global batch of a step of the block, counted for several steps at once."""
        block, windows = self._chosen
        steps = max(1, _COUNTED // self.global_batch)
        group = inside // steps
        if self._targets[:2] != (block, group):
            counted = windows[group * steps : (group + 1) * steps]
            self._targets = (block, group, self.source.targets(counted.reshape(-1)).reshape(counted.shape).sum(axis=1))
        return int(self._targets[2][inside - group * steps])


@with_config(ConfigDict(strict=True))
class Position(TypedDict):
    """Of a ``TrainLoader`` in its data."""

    epoch: Annotated[int, Field(ge=0, lt=2**40)]
    batches: Annotated[int, Field(ge=0, lt=2**40)]  # yielded in this epoch
    accumulate: Annotated[int, Field(ge=1, lt=2**31)]
    global_batch: Annotated[int, Field(ge=1, lt=2**31)]


def steps_of(source: Source, global_batch: int) -> int:
    """Optimizer steps of an epoch."""
    return max(1, source.windows // global_batch)


def placed(state: Position, global_batch: int, accumulate: int, batches: int) -> tuple[int, int]:
    """The epoch, and the micro-batches already yielded in it, for a loader of ``batches`` per epoch that resumes at
    ``state``.

    UserError: it was saved with a different global batch or a larger corpus.
    """
    if state["global_batch"] != global_batch:
        raise ConfigError(
            f"data.global_batch={global_batch} differs from the checkpoint's {state['global_batch']}, the unit of its "
            f"position in the data: resume with data.global_batch={state['global_batch']}"
        )
    steps, inside = divmod(state["batches"], state["accumulate"])
    # Within a step only equal micro-batches give the same data; Lightning saves between steps.
    done = steps * accumulate + (inside if state["accumulate"] == accumulate else 0)
    if done > batches:
        raise UserError(
            f"the checkpoint is at batch {done} of an epoch, which has {batches} now: it was saved with different data"
            " or a different data.seq_len"
        )
    return state["epoch"], done


class TrainLoader:
    """The micro-batches of one rank, as a sized iterable that can be stopped and resumed exactly.

    One round of iteration is an epoch of ``len()`` micro-batches: as many whole optimizer steps as a pass over the
    corpus holds, at least one. The windows continue from epoch to epoch (see ``order``), so nothing is dropped between
    two epochs.

    The state is plain numbers and the same on every rank, so rank 0's serves all. It counts what was yielded, not what
    workers have prefetched. It also fits a run with different ranks, workers or gradient accumulation, as long as
    ``global_batch`` stays the same.
    """

    def __init__(
        self,
        source: Source,
        *,
        global_batch: int,
        micro_batch: int,
        accumulate: int,
        rank: int,
        world_size: int,
        workers: int = 0,
        context: str | None = None,
        pin_memory: bool = False,
    ) -> None:
        """workers: processes that prefetch batches, started with the first batch and ended by ``close``; 0: none.
        context: how they start, "fork" or "spawn"; None: the system's default. ConfigError: the batch sizes do not fit
        together."""
        if micro_batch * accumulate * world_size != global_batch:
            raise ConfigError(
                f"data.global_batch={global_batch} is not data.batch_size x trainer.accumulate x devices = "
                f"{micro_batch} x {accumulate} x {world_size} = {micro_batch * accumulate * world_size}"
            )
        self._make = _MicroBatches(source, global_batch, micro_batch, accumulate, rank)
        self._global_batch, self._accumulate = global_batch, accumulate
        self._workers, self._context, self._pin_memory = workers, context, pin_memory
        self._steps = steps_of(source, global_batch)
        self._epoch = 0
        self._batches = 0  # yielded in this epoch
        self._ahead: Ahead[Batch] | None = None

    def __len__(self) -> int:
        return self._steps * self._accumulate

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the current epoch, or the next epoch if nothing of it is left."""
        if self._batches >= len(self):
            self._epoch, self._batches = self._epoch + 1, 0
        while self._batches < len(self):
            batch = self._batch(self._epoch * len(self) + self._batches)
            # Before yielding: a state saved while the consumer works on a batch counts that batch as done.
            self._batches += 1
            yield {name: tensor.pin_memory() for name, tensor in batch.items()} if self._pin_memory else batch

    def close(self) -> None:
        """End the workers; iterating starts new ones."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def state_dict(self) -> Position:
        """Position after the last batch yielded; ``batches`` counts this rank's micro-batches, ``accumulate`` per
        step."""
        return {
            "epoch": self._epoch,
            "batches": self._batches,
            "accumulate": self._accumulate,
            "global_batch": self._global_batch,
        }

    def load_state_dict(self, state: Position) -> None:
        """Resume at ``state``. UserError: see ``placed``."""
        self._epoch, self._batches = placed(state, self._global_batch, self._accumulate, len(self))

    def _batch(self, index: int) -> Batch:
        if not self._workers:
            return self._make(index)
        if self._ahead is None or self._ahead.next != index:  # the beginning, or a state was loaded
            self.close()
            self._ahead = Ahead(self._make, index, self._workers, self._context)
        return self._ahead.take()


class ValLoader:
    """One rank's share of the validation windows, in batches of one shape, the same number on every rank.

    Over all ranks every chosen window comes once; padding rows and batches have no targets that count.
    """

    def __init__(
        self,
        parts: Sequence[Windows],
        *,
        batch_size: int,
        token_bytes: np.ndarray,
        rank: int,
        world_size: int,
        limit_batches: int | None = None,
        pin_memory: bool = False,
        masked: bool = False,
    ) -> None:
        """parts: one or more, see ``Chain``; token_bytes: (V,) bytes per id. limit_batches: batches over all ranks
        together, spread evenly over the text. masked: some windows may have no target that counts; these are skipped.

        UserError: no window has one.
        """
        self._windows, self._batch_size, self._pin_memory = Chain(parts), batch_size, pin_memory
        self._token_bytes = token_bytes.astype(np.int64)
        self._counting = _counting(self._windows) if masked else None
        self._windows_left = self._windows.numbers if self._counting is None else self._counting.size
        self._count = (
            self._windows_left if limit_batches is None else min(limit_batches * batch_size, self._windows_left)
        )  # over all ranks
        self._batches = -(-self._count // (batch_size * world_size))
        self._first = rank * self._batches * batch_size

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        for index in range(self._batches):
            first = self._first + index * self._batch_size
            places = np.arange(
                first, min(first + self._batch_size, self._count), dtype=np.int64
            )  # maybe none on the last ranks
            chosen = spread(places, self._count, self._windows_left)
            yield self._batch(chosen if self._counting is None else self._counting[chosen])

    def _batch(self, chosen: np.ndarray) -> Batch:
        rows = self._filled(chosen)
        counted = rows.targets[rows.targets != IGNORE]
        batch = _tensors(rows) | {
            "n_targets": torch.tensor(counted.size),
            "n_bytes": torch.tensor(int(self._token_bytes[counted].sum())),
        }
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if self._pin_memory else batch

    def _filled(self, chosen: np.ndarray) -> WindowBatch:
        """The windows, and below them rows without targets."""
        if len(chosen) == self._batch_size:
            return self._windows.rows(chosen)
        # WindowBatch of a real window, so that all batches have the same fields.
        rows = self._windows.rows(np.concatenate([chosen, np.zeros(self._batch_size - len(chosen), dtype=np.int64)]))
        rows.targets[len(chosen) :] = IGNORE
        return rows


def _counting(windows: Windows) -> np.ndarray:
    """The numbers (int64) of the windows with a target that counts."""
    blocks = (
        np.arange(first, min(first + _COUNTED, windows.numbers), dtype=np.int64)
        for first in range(0, windows.numbers, _COUNTED)
    )
    found = np.concatenate([block[windows.targets(block) > 0] for block in blocks])
    if not found.size:
        raise UserError(
            "the validation text has nothing to predict: its windows contain no assistant tokens; raise data.seq_len"
        )
    return found


def _tensors(rows: WindowBatch) -> Batch:
    batch = {"ids": torch.from_numpy(rows.ids), "targets": torch.from_numpy(rows.targets)}
    return batch if rows.doc_ids is None else batch | {"doc_ids": torch.from_numpy(rows.doc_ids)}
