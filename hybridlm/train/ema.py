"""An exponential moving average (EMA) of the weights: kept in fp32, validated beside the model, saved in every
checkpoint."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import lightning
import torch
from torch import Tensor

from hybridlm.runs.checkpoint import EMA_KEY
from hybridlm.train.lightning_module import log_loss, loss_sums, model_of

if TYPE_CHECKING:
    from hybridlm.model.lm import HybridLM


class EMA(lightning.Callback):
    """``average += (1 - d) * (weights - average)`` after each optimizer step, where d is ``decay``, or (1 + step) / (10
    + step) while that is less, so that the initial weights are forgotten quickly.

    The average depends only on the weights and the step, so a resumed run has the one it would have had. It is in the
    checkpoint under a key of its own, not among the callbacks' states, so that a run can be resumed without it and
    other readers find it. (Lightning's WeightAveraging validates the average only and saves it in the model's place.)
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._model: HybridLM | None = None
        self._loaded: dict[str, Tensor] | None = None
        self._step = 0
        self._val = torch.empty(0)  # (3,) sums of the running validation, as from `loss_sums`

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._step = trainer.global_step
        self._model = copy.deepcopy(model_of(pl_module)).float().eval().requires_grad_(False)
        if self._loaded is not None:
            self.restore(self._loaded)
            self._loaded = None

    @torch.no_grad()
    def restore(self, averages: dict[str, Tensor]) -> None:
        """Takes the averages of a checkpoint, which has them under ``EMA_KEY``."""
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
        weights = [weight.detach().float() for weight in model_of(pl_module).parameters()]
        torch._foreach_lerp_(list(self._model.parameters()), weights, 1 - keep)

    def on_validation_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self._model is None:
            return
        self._val = torch.zeros(3, dtype=torch.float64, device=pl_module.device)
        for ours, current in zip(self._model.buffers(), model_of(pl_module).buffers(), strict=True):
            ours.copy_(current)  # a router's selection bias is not averaged

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._model is not None and dataloader_idx == 0:
            with trainer.precision_plugin.val_step_context():
                self._val += loss_sums(self._model, batch)

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self._model is not None:
            log_loss(pl_module, self._val, "val/ema_")

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._model is not None:
            checkpoint[EMA_KEY] = {name: parameter.detach() for name, parameter in self._model.named_parameters()}

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._loaded = checkpoint.get(EMA_KEY)
