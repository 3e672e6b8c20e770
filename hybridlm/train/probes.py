"""Probes during the training of a text model, beside its validation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning

from hybridlm.eval.probes import text_probe_metrics
from hybridlm.train.compiled import eager

if TYPE_CHECKING:
    from hybridlm.config.logging import ProbesConfig
    from hybridlm.data.tokenizer import Tokenizer


class Probes(lightning.Callback):
    """Measures the probes at each validation whose step ``interval`` divides and at the last one, on every rank alike:
    with sharded weights no rank can go without the others."""

    def __init__(self, config: ProbesConfig, interval: int, tokenizer: Tokenizer) -> None:
        self._config, self._interval, self._tokenizer = config, interval, tokenizer

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.state.fn == "fit" and trainer.global_step % self._interval != 0:
            return
        with trainer.precision_plugin.val_step_context(), eager(pl_module.model):
            found = text_probe_metrics(
                pl_module.model, self._tokenizer, examples=self._config.examples, length=self._config.length
            )
        for name, value in found.items():
            pl_module.log(f"probe/{name}", value, logger=False, sync_dist=True)
