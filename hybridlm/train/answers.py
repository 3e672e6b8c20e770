"""How many answers of a synthetic task are right, and how many examples in all their answers, by length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm.config.synthetic import words
from hybridlm.data.synthetic.examples import as_text
from hybridlm.data.synthetic.source import held_out
from hybridlm.data.windows.order import IGNORE

if TYPE_CHECKING:
    from hybridlm.config.data import DataConfig
    from hybridlm.model.lm import HybridLM

_SHOWN = 3  # examples
_LOGITS = 1 << 25  # numbers at a time


class Answers(lightning.Callback):
    """Measures each validation loader of a synthetic task, one for each length: the loss, the share of answers that are
    right, and the share of examples all of whose answers are. The first loader's, of the length of training, stand
    without their length too."""

    def __init__(self, lengths: Sequence[int]) -> None:
        """lengths: of the loaders, in their order."""
        self._lengths = list(lengths)
        self._sums: Tensor | None = None  # (lengths, 5): nats, answers, right answers, examples, right examples

    def on_validation_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._sums = torch.zeros(len(self._lengths), 5, dtype=torch.float64, device=pl_module.device)

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert self._sums is not None
        model, (_, length) = pl_module.model, batch["ids"].shape
        rows = max(1, _LOGITS // (length * model.vocab_size))
        for ids, targets in zip(batch["ids"].split(rows), batch["targets"].split(rows), strict=True):
            with trainer.precision_plugin.val_step_context():
                logits = model(ids).logits
            self._sums[dataloader_idx] += measured(logits, targets)

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert self._sums is not None
        rows = trainer.strategy.reduce(self._sums, reduce_op="sum").tolist()
        for length, (nats, answers, right, examples, whole) in zip(self._lengths, rows, strict=True):
            found = {"accuracy": right / answers, "exact": whole / examples}
            if length == self._lengths[0]:
                self._log(pl_module, {f"val/{name}": value for name, value in found.items()})
            self._log(
                pl_module, {f"val/{name}/{length}": value for name, value in {"loss": nats / answers, **found}.items()}
            )

    @staticmethod
    def _log(pl_module: lightning.LightningModule, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():  # the same number on every rank
            pl_module.log(name, value, logger=False, sync_dist=True)


def measured(logits: Tensor, targets: Tensor) -> Tensor:
    """(5,) float64 of a batch: nats, answers, right ones, examples, those all of whose answers are right. logits: (B,
    T, V); targets: (B, T), -100 where nothing is asked; a row without an answer only fills up."""
    asked = targets != IGNORE
    right = (logits.argmax(-1) == targets) & asked
    real = asked.any(dim=1)
    whole = (right.sum(dim=1) == asked.sum(dim=1)) & real
    nats = F.cross_entropy(logits[asked].double(), targets[asked], reduction="sum")
    return torch.stack([nats, asked.sum().double(), right.sum().double(), real.sum().double(), whole.sum().double()])


@torch.inference_mode()
def answered(model: HybridLM, config: DataConfig) -> list[str]:
    """Some held-out examples with the model's answers, as text. The model is in evaluation mode."""
    windows = held_out(config)[0]
    chosen = torch.arange(min(_SHOWN, windows.numbers)).numpy()
    rows = windows.rows(chosen)
    logits = model(torch.from_numpy(rows.ids).to(model.embedding.weight.device)).logits
    assert logits is not None
    names = words(config.synthetic)
    # An answer that is a padded id of the vocabulary is none of the task's words.
    given = logits[..., : len(names)].argmax(-1).cpu().numpy()
    return [as_text(*row, words=names, given=said) for *row, said in zip(rows.ids, rows.targets, given, strict=True)]
