"""A fit through Lightning that keeps the batches it saw."""

from __future__ import annotations

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from hybridlm.data.datamodule import DataModule


class Toy(lightning.LightningModule):
    """Guesses the next token modulo 4 (small, so that no step waits for threads); keeps the batches it has seen."""

    def __init__(self, fail_at=None):
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(257, 4))
        self.seen, self.val_bytes, self.val_documents, self.fail_at = [], 0, False, fail_at

    def training_step(self, batch, batch_idx):
        if self.fail_at is not None and self.global_step >= self.fail_at:
            raise RuntimeError("killed")
        self.seen.append(batch["ids"].clone())
        counted = batch["targets"] >= 0
        logits = self.table[batch["ids"][counted]]
        return (
            torch.nn.functional.cross_entropy(logits, batch["targets"][counted] % 4, reduction="sum")
            / batch["n_targets"]
        )

    def validation_step(self, batch, batch_idx):
        self.val_bytes += batch["n_bytes"].item()
        self.val_documents = "doc_ids" in batch

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def fit(corpus, steps, folder, *, accumulate, fail_at=None, ckpt=None, every=1, val_every=None, workers=0, devices=1):
    data, config = corpus
    module = Toy(fail_at)
    datamodule = DataModule(
        data,
        config.model_copy(update={"workers": workers}),
        global_batch=8,
        micro_batch=8 // accumulate // devices,
        accumulate=accumulate,
        seed=7,
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=val_every * accumulate if val_every else 10**6,
        callbacks=[ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1)],
    )
    if fail_at is None:
        trainer.fit(module, datamodule, ckpt_path=ckpt)
    else:
        with pytest.raises(RuntimeError, match="killed"):
            trainer.fit(module, datamodule, ckpt_path=ckpt)
    return module, datamodule


def fits_of_a_rank(corpus, steps, folder):
    """Whole fits and fits resumed at every step, with and without workers, in one of two processes (gloo)."""
    seen = {}
    for workers in (0, 2):
        for stop in range(steps):
            ckpt, every = (folder / f"step={stop}.ckpt", 100) if stop else (None, 1 if workers == 0 else 100)
            module, datamodule = fit(
                corpus, steps, folder, accumulate=2, ckpt=ckpt, every=every, workers=workers, devices=2
            )
            seen[f"{workers} {stop}"] = module.seen
    torch.save(seen, folder / f"rank{datamodule.trainer.global_rank}.pt")
