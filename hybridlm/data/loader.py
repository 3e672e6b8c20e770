"""Batches of windows for training and validation.

A batch is a dict of tensors: ``ids`` (B, T) int64, ``targets`` (B, T) int64 with -100 where nothing counts, and ``n_targets`` () int64, the
number of targets that count. In training that is the number of the whole optimizer step over all ranks and micro-batches, by which a sum of
losses is divided; in validation it is this batch's own, and ``n_bytes`` () int64 says how many bytes of text these targets stand for.
Where packed documents are to be kept apart there is also ``doc_ids`` (B, T) int64, the document of each token within its row.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from hybridlm.config.section import ConfigError
from hybridlm.data.packing import Packing
from hybridlm.data.windows import IGNORE, shuffled, step_positions, validation_starts, window_count, window_starts

Batch = dict[str, torch.Tensor]


class TrainLoader:
    """The micro-batches of one rank, as a sized iterable that can be stopped and resumed exactly.

    One round of iteration is an epoch of ``len()`` micro-batches: as many whole optimizer steps as a pass over the corpus holds, at least
    one. The windows themselves follow on from epoch to epoch (see ``windows``), so nothing is dropped between two of them.

    The state is plain numbers and the same on every rank, so rank 0's serves all. It also fits a run with other ranks or another
    accumulation, as long as ``global_batch`` stays.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        seq_len: int,
        global_batch: int,
        micro_batch: int,
        accumulate: int,
        rank: int,
        world_size: int,
        seed: int,
        packing: Packing | None = None,
        isolate: bool = True,
        pin_memory: bool = False,
    ) -> None:
        """``tokens`` (N,) of integers, for instance a memory map. packing: of whole documents into the windows; None: windows are cut
        anywhere. isolate: give the model the documents of packed windows. ConfigError: the batch sizes do not fit together, or no window
        fits."""
        if micro_batch * accumulate * world_size != global_batch:
            raise ConfigError(
                f"data.global_batch={global_batch} is not data.batch_size x trainer.accumulate x devices = "
                f"{micro_batch} x {accumulate} x {world_size} = {micro_batch * accumulate * world_size}"
            )
        self._tokens = tokens
        self._seq_len, self._global_batch, self._micro_batch, self._accumulate = seq_len, global_batch, micro_batch, accumulate
        self._rank, self._seed, self._pin_memory = rank, seed, pin_memory
        self._packing, self._isolate = packing, isolate
        windows = window_count(len(tokens), seq_len) if packing is None else len(packing)
        self._steps = max(1, windows // global_batch)  # optimizer steps of an epoch
        self._epoch = 0
        self._batches = 0  # handed out in this epoch

    def __len__(self) -> int:
        return self._steps * self._accumulate

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the current epoch, or the next epoch if nothing of it is left."""
        if self._batches >= len(self):
            self._epoch, self._batches = self._epoch + 1, 0
        while self._batches < len(self):
            batch = self._batch(self._epoch, self._batches)
            self._batches += 1  # before handing out: a state saved while the consumer works on a batch counts that batch as done
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Position after the last batch handed out; ``batches`` counts this rank's micro-batches at ``accumulate`` per step."""
        return {"epoch": self._epoch, "batches": self._batches, "accumulate": self._accumulate, "global_batch": self._global_batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where ``state`` was taken. ConfigError: it comes from another global batch or corpus size."""
        if state["global_batch"] != self._global_batch:
            raise ConfigError(
                f"data.global_batch={self._global_batch} differs from the checkpoint's {state['global_batch']}, "
                f"in which its position in the data is counted: resume with data.global_batch={state['global_batch']}"
            )
        steps, inside = divmod(state["batches"], state["accumulate"])
        # Inside a step only the same cut gives the same data; Lightning saves between steps.
        batches = steps * self._accumulate + (inside if state["accumulate"] == self._accumulate else 0)
        if batches > len(self):
            raise ConfigError(
                f"the checkpoint stands at batch {batches} of an epoch, which has {len(self)} here: "
                "it comes from other data or another data.seq_len"
            )
        self._epoch, self._batches = state["epoch"], batches

    def _batch(self, epoch: int, index: int) -> Batch:
        step, micro = divmod(index, self._accumulate)
        positions = step_positions(
            epoch * self._steps + step,
            global_batch=self._global_batch,
            micro_batch=self._micro_batch,
            accumulate=self._accumulate,
            rank=self._rank,
            micro=micro,
        )
        batch = self._cut(positions) if self._packing is None else self._packed(self._packing, positions, epoch * self._steps + step)
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if self._pin_memory else batch

    def _cut(self, positions: np.ndarray) -> Batch:
        starts = window_starts(positions, n_tokens=len(self._tokens), seq_len=self._seq_len, seed=self._seed)
        windows = torch.from_numpy(self._tokens[starts[:, None] + np.arange(self._seq_len + 1)].astype(np.int64))  # (B, T + 1)
        return {
            "ids": windows[:, :-1].contiguous(),
            "targets": windows[:, 1:].contiguous(),
            "n_targets": torch.tensor(self._global_batch * self._seq_len),  # every position of a training window counts
        }

    def _packed(self, packing: Packing, positions: np.ndarray, step: int) -> Batch:
        everyones = np.arange(step * self._global_batch, (step + 1) * self._global_batch, dtype=np.int64)
        chosen = shuffled(everyones, count=len(packing), seed=self._seed)
        rows = [packing.window(self._tokens, int(window)) for window in chosen[positions - everyones[0]]]
        ids, targets, doc_ids = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*rows, strict=True))
        batch = {"ids": ids, "targets": targets, "n_targets": torch.tensor(packing.targets_of(chosen))}
        return batch | {"doc_ids": doc_ids} if self._isolate else batch


class ValLoader:
    """One rank's share of the validation windows, in batches of one shape and of the same number on every rank.

    Over all ranks every chosen window comes once; rows and batches that only fill up have no targets that count.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        seq_len: int,
        batch_size: int,
        token_bytes: np.ndarray,
        rank: int,
        world_size: int,
        limit_batches: int | None = None,
        pin_memory: bool = False,
    ) -> None:
        """``token_bytes`` (V,): bytes per id. ``limit_batches``: batches over all ranks together, spread evenly over the text.

        ConfigError: the text holds nothing to predict.
        """
        self._tokens, self._seq_len, self._batch_size, self._pin_memory = tokens, seq_len, batch_size, pin_memory
        self._token_bytes = token_bytes.astype(np.int64)
        starts = validation_starts(len(tokens), seq_len, None if limit_batches is None else limit_batches * batch_size)
        self._batches = -(-starts.size // (batch_size * world_size))
        share = self._batches * batch_size
        self._starts = starts[rank * share : (rank + 1) * share]  # shorter, maybe empty, on the last ranks

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        for index in range(self._batches):
            yield self._batch(self._starts[index * self._batch_size : (index + 1) * self._batch_size])

    def _batch(self, starts: np.ndarray) -> Batch:
        ids = np.zeros((self._batch_size, self._seq_len), dtype=np.int64)  # any id fills up: its target does not count
        targets = np.full((self._batch_size, self._seq_len), IGNORE, dtype=np.int64)
        n_targets = n_bytes = 0
        for row, start in enumerate(starts):
            window = np.asarray(self._tokens[start : start + self._seq_len + 1], dtype=np.int64)
            length = window.size - 1
            ids[row, :length], targets[row, :length] = window[:-1], window[1:]
            n_targets += length
            n_bytes += int(self._token_bytes[window[1:]].sum())
        batch = {
            "ids": torch.from_numpy(ids),
            "targets": torch.from_numpy(targets),
            "n_targets": torch.tensor(n_targets),
            "n_bytes": torch.tensor(n_bytes),
        }
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if self._pin_memory else batch
