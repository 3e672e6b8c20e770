"""What makes a resumed run the uninterrupted one where Lightning does not: random numbers and learning rates."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import lightning
import numpy as np
import torch


class ExactSteps(lightning.Callback):
    """Makes each step a function of the configuration, the step and the state before it.

    Random numbers: the generators of torch, numpy and Python are seeded anew at every micro-batch, by (seed, rank,
    micro-batch), so that nothing random depends on what ran before; no generator's state needs to be saved.

    Rates: a checkpoint holds the rate of the step that was to come, by the schedule of that time. Where ``max_steps``
    or a rate was changed for the resume that is another one (0 at the end of a linear decay): the settings of each
    parameter group are those of today, and its rate is what today's schedule says of the step.
    """

    def __init__(self, seed: int, accumulate: int) -> None:
        """``accumulate``: micro-batches of an optimizer step."""
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
    """Seeds every global generator by a hash of the three, so that neighbours have nothing in common."""
    mixed = int.from_bytes(hashlib.blake2b(f"{seed},{rank},{micro_batch}".encode(), digest_size=8).digest(), "big")
    torch.manual_seed(mixed)
    np.random.seed(mixed % 2**32)
    random.seed(mixed)
