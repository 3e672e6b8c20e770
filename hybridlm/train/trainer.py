"""Lightning's Trainer, built from the configuration."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from hybridlm.machine.launcher import launch
from hybridlm.train.checkpoint_io import AtomicCheckpointIO, BackgroundCheckpointIO
from hybridlm.train.launch import strategy
from hybridlm.train.precision import BFloat16
from hybridlm.train.ranks import Ranks, ranks

if TYPE_CHECKING:
    from lightning.pytorch.loggers.logger import Logger

    from hybridlm.config.run import RunConfig
    from hybridlm.machine.description import Machine
    from hybridlm.runs.run_folder import RunFolder
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
) -> lightning.Trainer:
    """A Trainer that counts optimizer steps, leaves checkpoints to ``callbacks``, and prints nothing itself."""
    settings = config.trainer
    every = settings.val_every or _NEVER
    writer = AtomicCheckpointIO()
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
            Ranks(ranks(machine)),
            *own_precision,
        ],
        use_distributed_sampler=False,  # our loaders shard by rank themselves
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        val_check_interval=every * machine.accumulate,
        check_val_every_n_epoch=None,
        default_root_dir=folder.path,
    )
