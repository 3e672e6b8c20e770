"""Routers during training: the selection bias that evens out the load of experts, and what is logged of that load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import lightning
import torch

from hybridlm.layers.ffn import FFN, RouterStats
from hybridlm.model.block import Block
from hybridlm.model.lm import HybridLM
from hybridlm.train.lightning_module import hybrid_optimizer
from hybridlm.train.metrics import Metrics

_NAMED = 8  # dead experts that a warning names before it only counts them


def routers_of(model: HybridLM) -> dict[int, FFN]:
    """The FFNs with a router by the index of their layer."""
    ffns = {i: cast(Block, block).ffn for i, block in enumerate(model.blocks)}
    return {i: ffn for i, ffn in ffns.items() if ffn is not None and ffn.n_experts}


class RouterCallback(lightning.Callback):
    """Sums what routers report over the micro-batches of a step and over ranks, moves the selection biases of sigmoid
    routers after each optimizer step, equally on all ranks, and keeps the sums of a log interval.

    Stands before MetricsCallback in the list of callbacks, which asks it for the metrics of a logged step.
    """

    def __init__(self, layers: dict[int, FFN], log_every: int, say: Callable[[str], None]) -> None:
        """``layers``: as from ``routers_of``, at least one. ``say`` prints a line on the first rank."""
        self._layers, self._log_every, self._say = layers, log_every, say
        self._step = 0
        self._counts = torch.empty(0)  # (layers, E) of the running step, this rank's
        self._warned: set[int] = set()
        # Of the interval since the last step that log_every divides:
        self._interval = torch.empty(0)  # (layers, E), all ranks'
        self._losses = torch.empty(0)  # (layers, 2) balance loss and z-loss summed over micro-batches, this rank's
        self._batches = self._steps = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._step = trainer.global_step
        shape = (len(self._layers), next(iter(self._layers.values())).n_experts)
        self._counts = torch.zeros(shape, dtype=torch.int64, device=pl_module.device)
        self._begin_interval()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stats: list[RouterStats] = [outputs["router"][layer] for layer in self._layers]
        self._counts += torch.stack([layer.counts for layer in stats])
        self._losses += torch.stack([torch.stack([layer.balance_loss, layer.z_loss]) for layer in stats])
        self._batches += 1
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        counts = trainer.strategy.reduce(self._counts, reduce_op="sum")
        if hybrid_optimizer(trainer).refused is False:  # else the loads are of a step that changed no weight either
            for ffn, row in zip(self._layers.values(), counts, strict=True):
                ffn.balance(row)
        self._interval += counts
        self._steps += 1
        self._counts = torch.zeros_like(self._counts)

    def metrics(self, trainer: lightning.Trainer) -> Metrics:
        """Of the steps since the last multiple of ``log_every``; every rank has to ask. Loads are relative to the mean
        over experts."""
        losses = trainer.strategy.reduce(self._losses.clone(), reduce_op="sum") / (self._batches * trainer.world_size)
        metrics: Metrics = {}
        for layer, counts, (balance, z) in zip(self._layers, self._interval.tolist(), losses.tolist(), strict=True):
            mean = sum(counts) / len(counts)
            dead = [expert for expert, count in enumerate(counts) if count == 0]
            metrics |= {
                f"moe/{layer}/max_load": max(counts) / mean,
                f"moe/{layer}/dead": len(dead),
                f"moe/{layer}/balance_loss": balance,
                f"moe/{layer}/z_loss": z,
                f"moe/{layer}/load": [round(count / mean, 4) for count in counts],
            }
            if self._steps == self._log_every:  # not after a resume within an interval, of which only the end was seen
                self._warn(layer, dead)
        if self._step % self._log_every == 0:
            self._begin_interval()
        return metrics

    def _begin_interval(self) -> None:
        self._interval = torch.zeros_like(self._counts)
        self._losses = torch.zeros(len(self._layers), 2, dtype=torch.float32, device=self._counts.device)
        self._batches = self._steps = 0

    def _warn(self, layer: int, dead: list[int]) -> None:
        """Once per layer, until each of its experts has had a token again."""
        if not dead:
            self._warned.discard(layer)
        elif layer not in self._warned:
            self._warned.add(layer)
            names = ", ".join(map(str, dead[:_NAMED])) + (", ..." if len(dead) > _NAMED else "")
            ffn = self._layers[layer]
            self._say(
                f"warning     layer {layer}: no token was routed to {len(dead)} of {ffn.n_experts} experts ({names}) in"
                f" the {self._steps} steps up to step {self._step}; a larger model.{ffn.balancing} spreads the load"
            )
