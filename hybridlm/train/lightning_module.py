"""Our model in Lightning's terms. It only wires: the maths is in the model, the optimizer and the schedule."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from hybridlm.layers.ffn import RouterStats
from hybridlm.model.lm import HybridLM
from hybridlm.optim.optimizer import HybridOptimizer, model_groups
from hybridlm.runs.checkpoint import KEY
from hybridlm.train.guards import spoiling
from hybridlm.train.schedule import lr_factor

if TYPE_CHECKING:
    from hybridlm.config.optim import OptimConfig
    from hybridlm.data.windows.loader import Batch
    from hybridlm.machine.description import Machine


class LitLM(lightning.LightningModule):
    """Loss, validation in bits per byte, optimizer, and our part of every checkpoint."""

    def __init__(
        self, model: HybridLM, optim: OptimConfig, machine: Machine, *, facts: dict[str, Any], sharded: bool
    ) -> None:
        """facts: our part of every checkpoint."""
        super().__init__()
        self.model = model
        self._optim, self._max_steps, self._sharded = optim, machine.max_steps, sharded
        self._facts = facts
        self._val: Tensor | None = None  # (nats, tokens, bytes) of the running validation

    def configure_model(self) -> None:
        """Shards the parameters, block by block and then the rest, where the strategy asks for it (FSDP2)."""
        if not self._sharded or isinstance(self.model.norm.weight, torch.distributed.tensor.DTensor):
            return
        from torch.distributed.fsdp import fully_shard

        assert self.device_mesh is not None
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """The loss is a sum over this micro-batch divided by the targets of the whole global batch, so that every
        target weighs the same. Lightning then averages over ranks and accumulation; the factor takes that back. A
        router's loss is a mean over this micro-batch: it weighs as much as the targets that it stands beside."""
        output = self.model(batch["ids"], doc_ids=batch.get("doc_ids"), targets=batch["targets"])
        shares = self.trainer.world_size * self.trainer.accumulate_grad_batches
        total = output.loss_sum if output.aux is None else output.loss_sum + output.aux * output.n_tokens
        return {
            "loss": spoiling(total * shares / batch["n_targets"]),
            "loss_sum": output.loss_sum.detach(),  # cross-entropy alone
            "n_targets": batch["n_targets"],
            "router": {
                layer: RouterStats(*[value.detach() for value in stats]) for layer, stats in output.router.items()
            },
        }

    def on_validation_epoch_start(self) -> None:
        self._val = torch.zeros(3, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        if dataloader_idx:  # another length of a synthetic task, which is not part of val/loss: see answers.py
            return
        output = self.model(batch["ids"], doc_ids=batch.get("doc_ids"), targets=batch["targets"])
        assert self._val is not None
        self._val += torch.stack([output.loss_sum.double(), output.n_tokens.double(), batch["n_bytes"].double()])

    def on_validation_epoch_end(self) -> None:
        assert self._val is not None
        # Reduced here as exact sums; sync_dist then averages equal numbers.
        nats, tokens, text_bytes = self.trainer.strategy.reduce(self._val, reduce_op="sum").tolist()
        self.log("val/loss", nats / tokens, logger=False, sync_dist=True)
        if text_bytes:
            self.log("val/bpb", nats / math.log(2) / text_bytes, logger=False, sync_dist=True)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = HybridOptimizer(model_groups(self.model, self._optim), self._optim)
        schedule = LambdaLR(optimizer, partial(lr_factor, config=self._optim, max_steps=self._max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The schedule stands at the step, and all else of it is that of today's settings (``ExactSteps``): of what the
        file says of it, torch would make attributes."""
        step = checkpoint["global_step"]
        checkpoint["lr_schedulers"] = [{"last_epoch": step, "_step_count": step + 1, "lr_lambdas": []}]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = self._facts
