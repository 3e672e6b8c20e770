"""What a validation measures beside the loss: a synthetic task's accuracy by length, and in-context probes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm.config.data import DataConfig
from hybridlm.config.logging import ProbesConfig
from hybridlm.config.synthetic import words
from hybridlm.data.synthetic.source import as_text, held_out
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.data.windows.order import IGNORE
from hybridlm.eval.probes import text_probe_metrics
from hybridlm.model.lm import HybridLM
from hybridlm.train.compiled import eager
from hybridlm.train.lightning_module import model_of

MEASURED = ("val/", "probe/")  # prefixes of the metrics of a validation
_SHOWN = 3  # examples
_LOGITS = 1 << 25  # numbers at a time


def validation_score(trainer: lightning.Trainer) -> float:
    """By which validations are ranked, less is better: val/bpb, or val/loss where targets stand for no text. The same
    on every rank."""
    metrics = trainer.callback_metrics
    return float(metrics["val/bpb"] if "val/bpb" in metrics else metrics["val/loss"])


class TaskAccuracy(lightning.Callback):
    """For each validation loader of a synthetic task, one per length: the loss, the share of answers that are right,
    and the share of examples with every answer right. The first loader, of the training length, is also logged without
    a length."""

    def __init__(self, lengths: Sequence[int]) -> None:
        """lengths: of the loaders, in their order."""
        self._lengths = list(lengths)
        self._sums = torch.empty(0)  # (lengths, 5), as from `answer_sums`

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
        model, (_, length) = model_of(pl_module), batch["ids"].shape
        rows = max(1, _LOGITS // (length * model.vocab_size))
        for ids, targets in zip(batch["ids"].split(rows), batch["targets"].split(rows), strict=True):
            with trainer.precision_plugin.val_step_context():
                logits = model(ids).logits
            self._sums[dataloader_idx] += answer_sums(logits, targets)

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        rows = trainer.strategy.reduce(self._sums, reduce_op="sum").tolist()
        metrics: dict[str, float] = {}
        for length, (nats, answers, right, examples, whole) in zip(self._lengths, rows, strict=True):
            found = {"accuracy": right / answers, "exact": whole / examples}
            if length == self._lengths[0]:
                metrics |= {f"val/{name}": value for name, value in found.items()}
            metrics |= {f"val/{name}/{length}": value for name, value in {"loss": nats / answers, **found}.items()}
        pl_module.log_dict(metrics, logger=False, sync_dist=True)  # the same numbers on every rank


def answer_sums(logits: Tensor, targets: Tensor) -> Tensor:
    """(5,) float64 of a batch: nats, answers, right answers, examples, examples with every answer right.

    logits: (B, T, V); targets: (B, T), -100 where no answer is asked for. A row without any is padding of the batch.
    """
    asked = targets != IGNORE
    right = (logits.argmax(-1) == targets) & asked
    real = asked.any(dim=1)
    whole = (right.sum(dim=1) == asked.sum(dim=1)) & real
    nats = F.cross_entropy(logits[asked].double(), targets[asked], reduction="sum")
    return torch.stack([nats, asked.sum().double(), right.sum().double(), real.sum().double(), whole.sum().double()])


@torch.inference_mode()
def task_samples(model: HybridLM, config: DataConfig) -> list[str]:
    """A few held-out examples with the model's answers, as text. The model must be in evaluation mode."""
    windows = held_out(config)[0]
    rows = windows.rows(torch.arange(min(_SHOWN, windows.numbers)).numpy())
    logits = model(torch.from_numpy(rows.ids).to(model.embedding.weight.device)).logits
    names = words(config.synthetic)
    # The vocabulary's padding ids are no words of the task.
    predicted = logits[..., : len(names)].argmax(-1).cpu().numpy()
    return [
        as_text(ids, targets, names, row) for ids, targets, row in zip(rows.ids, rows.targets, predicted, strict=True)
    ]


class InContextProbes(lightning.Callback):
    """Measures the probes of a text model after every validation whose step ``interval`` divides and after the last
    one, on every rank: with sharded weights no rank can run forward alone."""

    def __init__(self, config: ProbesConfig, interval: int, tokenizer: Tokenizer) -> None:
        self._config, self._interval, self._tokenizer = config, interval, tokenizer

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.state.fn == "fit" and trainer.global_step % self._interval != 0:
            return
        model, config = model_of(pl_module), self._config
        with trainer.precision_plugin.val_step_context(), eager(model):
            found = text_probe_metrics(model, self._tokenizer, examples=config.examples, length=config.length)
        pl_module.log_dict({f"probe/{name}": value for name, value in found.items()}, logger=False, sync_dist=True)
