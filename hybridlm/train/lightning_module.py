"""The model as a LightningModule. It only wires: the mathematics is in the model, the optimizer and the schedule."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, cast

import lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import LambdaLR

from hybridlm.config.optim import OptimConfig
from hybridlm.data.windows.loader import Batch
from hybridlm.layers.ffn import RouterStats
from hybridlm.machine.description import Machine
from hybridlm.model.lm import HybridLM
from hybridlm.optim.optimizer import HybridOptimizer, model_groups
from hybridlm.runs.checkpoint import KEY
from hybridlm.train.objective import MEASURES, objective_of
from hybridlm.train.schedule import lr_factor


class LitLM(lightning.LightningModule):
    """Loss, validation in bits per byte, optimizer, and hybridlm's part of every checkpoint."""

    def __init__(
        self, model: HybridLM, optim: OptimConfig, machine: Machine, *, facts: dict[str, Any], sharded: bool
    ) -> None:
        """facts: hybridlm's part of every checkpoint. sharded: parameters are sharded over devices (FSDP2)."""
        super().__init__()
        self.model = model
        self._optim, self._max_steps, self._sharded = optim, machine.max_steps, sharded
        self._facts = facts
        self.objective = objective_of(optim)
        self._val = torch.empty(0)  # sums of the running validation, as from the objective

    def configure_model(self) -> None:
        """Under FSDP2: shards the parameters, block by block and then the rest."""
        if not self._sharded or isinstance(self.model.norm.weight, torch.distributed.tensor.DTensor):
            return
        assert self.device_mesh is not None
        for module in (*self.model.blocks, self.model):
            fully_shard(module, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """The loss is the sum over this micro-batch divided by the number of targets in the global batch, so that every
        target has the same weight. Lightning then averages over ranks and accumulation; the factor undoes that."""
        found = self.objective.losses(self.model, batch)
        shares = self.trainer.world_size * self.trainer.accumulate_grad_batches
        return {
            "loss": propagate_non_finite(found.total * shares / batch["n_targets"]),
            "loss_sum": found.loss.detach(),  # without that of routers
            "n_targets": batch["n_targets"],
            "measured": found.measured,
            "router": {
                layer: RouterStats(*[value.detach() for value in stats]) for layer, stats in found.output.router.items()
            },
        }

    def on_validation_epoch_start(self) -> None:
        self._val = torch.zeros(1, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        if dataloader_idx == 0:  # others are further lengths of a synthetic task: see `TaskAccuracy`
            self._val = self._val + self.objective.sums(self.model, batch)

    def on_validation_epoch_end(self) -> None:
        log_loss(self, self._val, "val/")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = HybridOptimizer(model_groups(self.model, self._optim), self._optim)
        schedule = LambdaLR(optimizer, partial(lr_factor, config=self._optim, max_steps=self._max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The schedule and Lightning's counters follow from the step (``ExactSteps`` sets the rates); only the position
        in the data is read. Lightning and torch would set whatever else the file contains as attributes."""
        step, loops = checkpoint["global_step"], self.trainer.fit_loop.state_dict()
        loops["state_dict"] = checkpoint["loops"]["fit_loop"]["state_dict"]
        steps = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]
        batches = loops["epoch_loop.batch_progress"]["total"]
        steps.update(dict.fromkeys(steps, step))
        batches.update(dict.fromkeys(batches, step * self.trainer.accumulate_grad_batches))
        checkpoint["loops"] = {"fit_loop": loops}
        checkpoint["lr_schedulers"] = [{"last_epoch": step, "_step_count": step + 1, "lr_lambdas": []}]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = self._facts


def model_of(module: lightning.LightningModule) -> HybridLM:
    """The model that ``module`` trains."""
    return cast(HybridLM, module.model)


def hybrid_optimizer(trainer: lightning.Trainer) -> HybridOptimizer:
    """The run's optimizer, without Lightning's wrapper."""
    optimizer = trainer.optimizers[0]
    return cast(HybridOptimizer, getattr(optimizer, "optimizer", optimizer))


def propagate_non_finite(loss: Tensor) -> Tensor:
    """``loss``, whose gradient is NaN everywhere if the loss is not finite; otherwise unchanged to the last bit.

    An infinite loss may have finite gradients. With this the optimizer sees it in the gradient norm, without a
    synchronisation with the host or between ranks.
    """
    return loss * (1 + (loss - loss).detach())


def log_loss(module: lightning.LightningModule, sums: Tensor, prefix: str) -> None:
    """Logs ``sums`` of an objective over all ranks: PREFIXloss in nats per target, PREFIXbpb for text, and what is
    measured of preferences."""
    # Reduced here as exact sums; sync_dist then averages equal numbers.
    nats, targets, text_bytes, *measured = module.trainer.strategy.reduce(sums, reduce_op="sum").tolist()
    module.log(f"{prefix}loss", nats / targets, logger=False, sync_dist=True)
    if text_bytes:
        module.log(f"{prefix}bpb", nats / math.log(2) / text_bytes, logger=False, sync_dist=True)
    for name, total in zip(MEASURES, measured, strict=False):
        module.log(f"{prefix}{name}", total / targets, logger=False, sync_dist=True)
