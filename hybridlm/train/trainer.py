"""Lightning's Trainer as our configuration describes it."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from hybridlm.machine.launcher import launch
from hybridlm.train.checkpoint_io import AtomicCheckpointIO
from hybridlm.train.launch import strategy
from hybridlm.train.precision import own_plugins
from hybridlm.train.ranks import Ranks, ranks

if TYPE_CHECKING:
    from lightning.pytorch.loggers.logger import Logger

    from hybridlm.config.run import RunConfig
    from hybridlm.machine.description import Machine
    from hybridlm.runs.run_folder import RunFolder
    from hybridlm.train.clock import Clock

_NEVER = 2**40  # steps between validations where there are none during training
# Notices of Lightning 2.6 that a user of hybridlm can do nothing about: each by its text, so that new ones are seen.
_NOT_FOR_USERS = (
    ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run
    ".*`srun` command is available on your system but is not used.*",  # on a login node
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",  # within Lightning itself
)


def quiet_lightning() -> None:
    """Keeps Lightning's adverts and the notices above off the screen, and those of other ranks."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _NOT_FOR_USERS:
        warnings.filterwarnings("ignore", message=message)
    launched = launch()
    rank_zero_only.rank = (
        0 if launched is None else launched.rank
    )  # Lightning reads it from what is left in the environment


def make_trainer(
    config: RunConfig,
    machine: Machine,
    folder: RunFolder,
    loggers: list[Logger],
    callbacks: list[Callback],
    clock: Clock | None = None,
) -> lightning.Trainer:
    """A Trainer that counts optimizer steps, writes checkpoints where ``callbacks`` say so, and prints nothing
    itself."""
    settings = config.trainer
    every = settings.val_every or _NEVER
    own_precision = own_plugins(machine.precision)
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
        plugins=[AtomicCheckpointIO(threaded=settings.async_checkpoints), Ranks(ranks(machine)), *own_precision],
        use_distributed_sampler=False,  # our loaders know their rank
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        val_check_interval=every * machine.accumulate,
        check_val_every_n_epoch=None,
        default_root_dir=folder.path,
    )
