"""A running average of the weights: kept in fp32 beside the model, validated with it, saved in every checkpoint."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import lightning
import torch
from torch import Tensor

from hybridlm.runs.checkpoint import EMA_KEY

if TYPE_CHECKING:
    from hybridlm.model.lm import HybridLM


class EMA(lightning.Callback):
    """``average += (1 - d) * (weights - average)`` after each optimizer step, where d is ``decay``, or (1 + step) / (10
    + step) as long as that is less, so that the first steps do not hold on to the initial weights.

    The average depends on nothing but the weights and the step, so a resumed run has the one it would have had. It
    stands in the checkpoint under a key of its own, not among the states of callbacks, so that a run may go on without
    it and others can read it.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._model: HybridLM | None = None
        self._loaded: dict[str, Tensor] | None = None
        self._step = 0
        self._val: Tensor | None = None  # (nats, tokens, bytes) of the running validation

    @torch.no_grad()
    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._step = trainer.global_step
        self._model = copy.deepcopy(pl_module.model).float().eval().requires_grad_(False)
        if self._loaded is not None:
            self.go_back(self._loaded)
            self._loaded = None

    @torch.no_grad()
    def go_back(self, averages: dict[str, Tensor]) -> None:
        """Take the averages of a checkpoint, what it has under ``EMA_KEY``."""
        assert self._model is not None
        for name, parameter in self._model.named_parameters():
            parameter.copy_(averages[name])

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        assert self._model is not None
        keep = min(self._decay, (1 + self._step) / (10 + self._step))
        averages, weights = (
            list(self._model.parameters()),
            [weight.detach().float() for weight in pl_module.model.parameters()],
        )
        torch._foreach_lerp_(averages, weights, 1 - keep)

    def on_validation_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self._model is None:
            return
        self._val = torch.zeros(3, dtype=torch.float64, device=pl_module.device)
        for mine, its in zip(self._model.buffers(), pl_module.model.buffers(), strict=True):
            mine.copy_(its)  # a router's selection bias is no weight

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._val is None or self._model is None or dataloader_idx:
            return
        with trainer.precision_plugin.val_step_context():
            output = self._model(batch["ids"], doc_ids=batch.get("doc_ids"), targets=batch["targets"])
        self._val += torch.stack([output.loss_sum.double(), output.n_tokens.double(), batch["n_bytes"].double()])

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self._val is None:
            return
        nats, tokens, text_bytes = trainer.strategy.reduce(self._val, reduce_op="sum").tolist()
        pl_module.log("val/ema_loss", nats / tokens, logger=False, sync_dist=True)
        if text_bytes:
            pl_module.log("val/ema_bpb", nats / math.log(2) / text_bytes, logger=False, sync_dist=True)

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._model is not None:
            checkpoint[EMA_KEY] = {name: parameter.detach() for name, parameter in self._model.named_parameters()}

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._loaded = checkpoint.get(EMA_KEY)
