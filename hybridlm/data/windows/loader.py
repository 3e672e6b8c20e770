"""Batches of windows for training and validation.

A batch is a dict of tensors: ``ids`` (B, T) int64, ``targets`` (B, T) int64 with -100 where nothing counts, and
``n_targets`` () int64, the number of targets that count. In training that is the number of the whole optimizer step
over all ranks and micro-batches, by which a sum of losses is divided; in validation it is this batch's own, and
``n_bytes`` () int64 is the number of bytes of text these targets stand for. Where packed documents are isolated there
is also ``doc_ids`` (B, T) int64, the document of each token within its row. Of preferences every window is two rows,
and counts as one target; there is also ``reference``, float64, one number for each row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Annotated

import numpy as np
import torch
from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from hybridlm.config.batch import BatchSplit
from hybridlm.data.windows.order import IGNORE, spread
from hybridlm.data.windows.window_sources import Chain, Source, WindowBatch, Windows
from hybridlm.errors import ConfigError, UserError

Batch = dict[str, torch.Tensor]

_AT_ONCE = 4096  # windows that are chosen, and their targets counted, at once: one by one that would cost more
_AHEAD = 4  # batches per worker


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
    two epochs. A micro-batch is a pure function of its number since the beginning of training.

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
        pin_memory: bool = False,
    ) -> None:
        """workers: threads that make batches ahead; 0: none. ConfigError: the batch sizes do not fit together."""
        if (problem := BatchSplit(global_batch, micro_batch, accumulate, world_size).problem) is not None:
            raise ConfigError(problem)
        self._source, self._rank, self._pin_memory = source, rank, pin_memory
        self._global_batch, self._micro_batch, self._accumulate = global_batch, micro_batch, accumulate
        self._steps = steps_of(source, global_batch)
        # At most a pass: for a source of a few windows many positions are many passes, each with its own keys.
        self._steps_at_once = max(1, min(_AT_ONCE, source.windows) // global_batch)
        self._chosen = lru_cache(maxsize=2)(self._choose)
        self._epoch = 0
        self._batches = 0  # yielded in this epoch
        self._workers = workers
        self._pool = ThreadPoolExecutor(workers) if workers else None
        self._ahead: dict[int, Future[Batch]] = {}

    def __len__(self) -> int:
        return self._steps * self._accumulate

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the current epoch, or the next epoch if nothing of it is left. RunFailed: a token file has
        changed."""
        if self._batches >= len(self):
            self._epoch, self._batches = self._epoch + 1, 0
        while self._batches < len(self):
            batch = self._batch(self._epoch * len(self) + self._batches)
            # Before yielding: a state saved while the consumer works on a batch counts that batch as done.
            self._batches += 1
            yield _pinned(batch) if self._pin_memory else batch

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
        if self._pool is None:
            return self._make(index)
        wanted = range(index, index + _AHEAD * self._workers)
        self._ahead = {one: self._ahead.get(one) or self._pool.submit(self._make, one) for one in wanted}
        return self._ahead[index].result()

    def _make(self, index: int) -> Batch:
        step, micro = divmod(index, self._accumulate)
        block, inside = divmod(step, self._steps_at_once)
        chosen, targets = self._chosen(block)
        first = (self._rank * self._accumulate + micro) * self._micro_batch  # a slice of the rank's contiguous slice
        batch = _tensors(self._source.rows(chosen[inside, first : first + self._micro_batch]))
        # If a whole global batch has no target, its loss is 0 and not 0 / 0.
        return batch | {"n_targets": torch.tensor(max(1, int(targets[inside])))}

    def _choose(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The windows (steps, global_batch) of the steps of a block, and the number of targets (steps,) of each."""
        size = self._steps_at_once * self._global_batch
        windows = self._source.choose(np.arange(block * size, (block + 1) * size, dtype=np.int64))
        shape = (self._steps_at_once, self._global_batch)
        return windows.reshape(shape), self._source.targets(windows).reshape(shape).sum(axis=1)


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
        self._windows: Windows = Chain(parts) if len(parts) > 1 else parts[0]
        self._batch_size, self._pin_memory = batch_size, pin_memory
        self._token_bytes = token_bytes.astype(np.int64)
        self._counting = _counting(self._windows) if masked else None
        self._windows_left = self._windows.numbers if self._counting is None else self._counting.size
        # Over all ranks.
        self._count = min(
            self._windows_left if limit_batches is None else limit_batches * batch_size, self._windows_left
        )
        self._batches = -(-self._count // (batch_size * world_size))
        self._first = rank * self._batches * batch_size

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        for index in range(self._batches):
            first = self._first + index * self._batch_size
            # Perhaps none on the last ranks.
            places = np.arange(first, min(first + self._batch_size, self._count), dtype=np.int64)
            chosen = spread(places, self._count, self._windows_left)
            batch = self._batch(chosen if self._counting is None else self._counting[chosen])
            yield _pinned(batch) if self._pin_memory else batch

    def _batch(self, chosen: np.ndarray) -> Batch:
        # Padding rows are real windows, so that all batches have the same fields.
        rows = self._windows.rows(np.pad(chosen, (0, self._batch_size - len(chosen))))
        rows.targets[len(chosen) * (len(rows.targets) // self._batch_size) :] = IGNORE
        counted = rows.targets[rows.targets != IGNORE]
        n_bytes = int(self._token_bytes[counted].sum())
        return _tensors(rows) | {"n_targets": torch.tensor(counted.size), "n_bytes": torch.tensor(n_bytes)}


def _counting(windows: Windows) -> np.ndarray:
    """The numbers (int64) of the windows with a target that counts."""
    numbers = np.arange(windows.numbers, dtype=np.int64)
    blocks = np.split(numbers, range(_AT_ONCE, windows.numbers, _AT_ONCE))
    found = np.concatenate([block[windows.targets(block) > 0] for block in blocks])
    if not found.size:
        raise UserError(
            "the validation text has nothing to predict: its windows contain no assistant tokens; raise data.seq_len"
        )
    return found


def _tensors(rows: WindowBatch) -> Batch:
    return {name: torch.from_numpy(array) for name, array in rows._asdict().items() if array is not None}


def _pinned(batch: Batch) -> Batch:
    return {name: tensor.pin_memory() for name, tensor in batch.items()}
