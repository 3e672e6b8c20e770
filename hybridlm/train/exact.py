"""Makes a resumed run equal to an uninterrupted one where Lightning does not: random numbers and learning rates."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import lightning
import numpy as np
import torch


class ExactSteps(lightning.Callback):
    """Makes each step a function of the configuration, the step number and the state before it.

    Random numbers: the generators of torch, numpy and Python are reseeded at every micro-batch, with (seed, rank,
    micro-batch), so that nothing random depends on what ran before, and no generator's state has to be saved.

    Learning rates: a checkpoint has the rate of its next step, by the schedule it was trained with. If ``max_steps`` or
    a rate is changed for the resume, that rate is wrong (0 at the end of a linear decay): each parameter group takes
    the settings of the current configuration, and its rate from the current schedule.
    """

    def __init__(self, seed: int, accumulate: int) -> None:
        """``accumulate``: micro-batches per optimizer step."""
        self._seed, self._accumulate = seed, accumulate
        self._settings: list[dict[str, Any]] = []
        self._step = self._inside = 0  # finished optimizer steps, micro-batches since

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Before the checkpoint is read."""
        self._settings = [
            {name: value for name, value in group.items() if name != "params"}
            for group in trainer.optimizers[0].param_groups
        ]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """After it."""
        self._step, self._inside = trainer.global_step, 0
        schedule = trainer.lr_scheduler_configs[0].scheduler
        assert isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)
        schedule.base_lrs = [group["initial_lr"] for group in self._settings]
        for group, settings, factor in zip(
            trainer.optimizers[0].param_groups, self._settings, schedule.lr_lambdas, strict=True
        ):
            group.update(settings, lr=settings["initial_lr"] * factor(schedule.last_epoch))

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._step:
            self._step, self._inside = trainer.global_step, 0
        seed_everything(self._seed, trainer.global_rank, self._step * self._accumulate + self._inside)
        self._inside += 1


def seed_everything(seed: int, rank: int, micro_batch: int) -> None:
    """Seeds every global generator with a hash of the three, so that neighbouring seeds are unrelated."""
    mixed = int.from_bytes(hashlib.blake2b(f"{seed},{rank},{micro_batch}".encode(), digest_size=8).digest(), "big")
    torch.manual_seed(mixed)
    np.random.seed(mixed % 2**32)
    random.seed(mixed)
