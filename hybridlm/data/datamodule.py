"""The prepared data for Lightning. Use ``Trainer(use_distributed_sampler=False)``: the loaders slice by rank
themselves."""

from __future__ import annotations

from collections.abc import Sequence

import lightning

from hybridlm.config.data import DataConfig
from hybridlm.data.corpus import Prepared
from hybridlm.data.synthetic.source import held_out
from hybridlm.data.windows.loader import Position, TrainLoader, ValLoader, placed, steps_of
from hybridlm.data.windows.splits import train_source, val_windows
from hybridlm.data.windows.window_sources import Windows


class DataModule(lightning.LightningDataModule):
    """Loaders over ``prepared`` for the rank that Lightning gives this process.

    The position in the training data is saved in Lightning's checkpoint (``loops.fit_loop``), so
    ``fit(ckpt_path=...)`` resumes exactly.
    """

    def __init__(
        self,
        prepared: Prepared,
        config: DataConfig,
        *,
        global_batch: int,
        micro_batch: int,
        accumulate: int,
        seed: int,
        val_batches: int | None = None,
        pin_memory: bool = False,
    ) -> None:
        """``global_batch`` windows per step are ``micro_batch`` x ``accumulate`` x ranks.

        ``val_batches``: micro-batches of a validation, over all ranks together; None: all there are.
        """
        super().__init__()
        self.prepared = prepared
        self._config = config
        self._global_batch, self._micro_batch, self._accumulate, self._seed = (
            global_batch,
            micro_batch,
            accumulate,
            seed,
        )
        self._val_batches, self._pin_memory = val_batches, pin_memory

    def train_dataloader(self) -> TrainLoader:
        """This rank's micro-batches. ConfigError: the batch sizes and the number of ranks do not fit together."""
        rank, world_size = self._place()
        return TrainLoader(
            train_source(self.prepared, self._config, self._seed),
            global_batch=self._global_batch,
            micro_batch=self._micro_batch,
            accumulate=self._accumulate,
            rank=rank,
            world_size=world_size,
            workers=self._config.workers,
            pin_memory=self._pin_memory,
        )

    def refuse(self, position: Position) -> None:
        """UserError: the training data cannot resume at ``position``."""
        steps = steps_of(train_source(self.prepared, self._config, self._seed), self._global_batch)
        placed(position, self._global_batch, self._accumulate, steps * self._accumulate)

    def val_dataloader(self) -> ValLoader | list[ValLoader]:
        """This rank's share of the held-out text, packed if the training text is.

        For a synthetic task one loader per length, that of training first."""
        if self._config.source == "synthetic":
            return [self._val_loader([windows]) for windows in held_out(self._config)]
        return self._val_loader(val_windows(self.prepared, self._config))

    def _val_loader(self, windows: Sequence[Windows]) -> ValLoader:
        rank, world_size = self._place()
        return ValLoader(
            windows,
            batch_size=self._micro_batch,
            token_bytes=self.prepared.tokenizer.token_bytes(),
            rank=rank,
            world_size=world_size,
            limit_batches=self._val_batches,
            pin_memory=self._pin_memory,
            masked=any(part.val.stream.masked for part in self.prepared.parts),
        )

    def _place(self) -> tuple[int, int]:
        """(rank, world size) over all nodes."""
        if self.trainer is None:
            raise RuntimeError("DataModule makes loaders for a Trainer: pass it to fit or validate")
        return self.trainer.global_rank, self.trainer.world_size
