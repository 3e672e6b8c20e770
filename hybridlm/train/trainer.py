"""Lightning's Trainer, built from the configuration, and what makes its steps exact."""

from __future__ import annotations

import hashlib
import logging
import random
import warnings
from typing import Any, Literal

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from hybridlm.config.run import RunConfig
from hybridlm.machine.description import Machine
from hybridlm.machine.launcher import Launch, launch
from hybridlm.model.lm import HybridLM
from hybridlm.runs.run_folder import RunFolder
from hybridlm.train.checkpoints import AtomicCheckpointIO, BackgroundCheckpointIO
from hybridlm.train.launch import Ranks, ranks, strategy
from hybridlm.train.metrics import Clock

_NEVER = 2**40  # steps between validations if there are none during training
# Warnings of Lightning 2.6 that a user of hybridlm can do nothing about, each by its text, so that new ones are seen.
_NOT_FOR_USERS = (
    ".*callbacks used to create the checkpoint need to be provided.*",  # resumed without early stopping
    ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run
    ".*`srun` command is available on your system but is not used.*",  # on a login node
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",  # within Lightning itself
)


def quiet_lightning() -> None:
    """Hides Lightning's adverts and the warnings above, and all but the first rank's output."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _NOT_FOR_USERS:
        warnings.filterwarnings("ignore", message=message)
    launched = launch()  # Lightning would read the rank from what an earlier run has left in the environment
    rank_zero_only.rank = 0 if launched is None else launched.rank  # type: ignore[attr-defined]


def make_trainer(
    config: RunConfig,
    machine: Machine,
    folder: RunFolder,
    loggers: list[Logger],
    callbacks: list[Callback],
    clock: Clock | None = None,
    processes: Launch | None = None,
) -> lightning.Trainer:
    """A Trainer that counts optimizer steps, leaves checkpoints to ``callbacks``, and prints nothing itself."""
    settings, writer = config.trainer, AtomicCheckpointIO()
    own_precision = [BFloat16()] if machine.precision == BFloat16.precision else []
    return lightning.Trainer(
        accelerator=machine.device,
        devices=machine.devices // machine.nodes,
        num_nodes=machine.nodes,
        strategy=strategy(settings.strategy, machine),
        precision=None if own_precision else machine.precision,  # type: ignore[arg-type]
        max_steps=machine.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=machine.accumulate,
        logger=loggers,
        profiler=clock,
        callbacks=callbacks,
        plugins=[
            BackgroundCheckpointIO(writer) if settings.async_checkpoints else writer,
            Ranks(processes or ranks(machine)),
            *own_precision,
        ],
        use_distributed_sampler=False,  # our loaders shard by rank themselves
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        val_check_interval=(settings.val_every or _NEVER) * machine.accumulate,
        check_val_every_n_epoch=None,
        default_root_dir=folder.path,
    )


class BFloat16(Precision):
    """Training in pure bfloat16 ("bf16-true"), except for the parameters that must not be rounded.

    Lightning's own plugin casts every parameter, including Mamba's decay rates and step biases, and makes bfloat16
    torch's default dtype, so that states and statistics are computed in it. Here a parameter's declaration
    (``ParamSpec.dtype``) decides, and the default dtype stays: layers decide what must be at least fp32. Weights have
    no fp32 master copy; moments are fp32 (see ``optim``), and updates are rounded to the nearest bfloat16, which loses
    those below 1/512 of a weight.
    """

    precision: Literal["bf16-true"] = "bf16-true"

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Rounds the parameters of the HybridLM in ``module`` that may be rounded, once, before the optimizer is
        built."""
        for model in module.modules():
            if isinstance(model, HybridLM):
                model.round_parameters(torch.bfloat16)
        return module


class ExactSteps(lightning.Callback):
    """Makes each step a function of the configuration, the step number and the state before it.

    Random numbers: the generators of torch, numpy and Python are reseeded at every micro-batch, with (seed, rank,
    micro-batch), so that nothing random depends on what ran before, and no generator's state has to be saved.

    Learning rates: a checkpoint has the rate of its next step, by the schedule it was trained with. If ``max_steps`` or
    a rate is changed for the resume, that rate is wrong (0 at the end of a linear decay): each parameter group takes
    the settings of the current configuration, and its rate from the current schedule.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._settings: list[dict[str, Any]] = []

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Before the checkpoint is read."""
        self._settings = [
            {name: value for name, value in group.items() if name != "params"}
            for group in trainer.optimizers[0].param_groups
        ]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """After it."""
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
        seed_everything(self._seed, trainer.global_rank, trainer.fit_loop.total_batch_idx)


def seed_everything(seed: int, rank: int, micro_batch: int) -> None:
    """Seeds every global generator with a hash of the three, so that neighbouring seeds are unrelated."""
    mixed = int.from_bytes(hashlib.blake2b(f"{seed},{rank},{micro_batch}".encode(), digest_size=8).digest(), "big")
    torch.manual_seed(mixed)
    np.random.seed(mixed % 2**32)
    random.seed(mixed)
