"""Resume through Lightning itself: what a stopped and resumed fit reads and learns is bit for bit what an uninterrupted one does."""

import itertools

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from hybridlm.config.data import DataConfig, TokenizerConfig
from hybridlm.data.datamodule import DataModule
from hybridlm.data.prepare import prepare

STEPS = 16


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(12):
        (folder / f"{i}.txt").write_text("".join(chr(97 + (i * k * k) % 26) for k in range(30)))
    config = DataConfig(
        source="files", path=f"{folder}/*.txt", out=f"{folder}/out", val_fraction=0.3, tokenizer=TokenizerConfig(kind="bytes"), seq_len=8
    )
    return prepare(config), config


class Toy(lightning.LightningModule):
    """Guesses the next token modulo 4 (small, so that no step waits for threads); keeps the batches it has seen."""

    def __init__(self, fail_at=None):
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(257, 4))
        self.seen, self.val_bytes, self.fail_at = [], 0, fail_at

    def training_step(self, batch, batch_idx):
        if self.fail_at is not None and self.global_step >= self.fail_at:
            raise RuntimeError("killed")
        self.seen.append(batch["ids"].clone())
        loss = torch.nn.functional.cross_entropy(self.table[batch["ids"]].flatten(0, 1), batch["targets"].flatten() % 4, reduction="sum")
        return loss / batch["n_targets"]

    def validation_step(self, batch, batch_idx):
        self.val_bytes += batch["n_bytes"].item()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def fit(prepared, folder, *, accumulate, fail_at=None, ckpt=None, every=1, val_every=None):
    data, config = prepared
    module = Toy(fail_at)
    datamodule = DataModule(data, config, global_batch=8, micro_batch=8 // accumulate, accumulate=accumulate, seed=7)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=STEPS,
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_fit_is_bit_exact(prepared, tmp_path, accumulate):
    whole, datamodule = fit(prepared, tmp_path / "whole", accumulate=accumulate, val_every=3)
    assert len(whole.seen) == STEPS * accumulate
    per_epoch = len(datamodule.trainer.train_dataloader) // accumulate
    assert 3 <= per_epoch <= 6  # stops below fall inside epochs and on their ends
    for stop in (per_epoch - 1, per_epoch, 2 * per_epoch, STEPS - 1):
        torch.manual_seed(stop)  # nothing may hang on the global generator
        resumed, _ = fit(
            prepared, tmp_path / f"resumed{stop}", accumulate=accumulate, ckpt=tmp_path / f"whole/step={stop}.ckpt", every=100, val_every=3
        )
        rest = whole.seen[stop * accumulate :]
        assert len(resumed.seen) == len(rest), stop
        assert all(torch.equal(a, b) for a, b in zip(resumed.seen, rest, strict=True)), stop
        assert torch.equal(resumed.table, whole.table), stop


@pytest.mark.filterwarnings("ignore")
def test_killed_again_and_again_it_still_sees_every_batch(prepared, tmp_path):
    whole, _ = fit(prepared, tmp_path / "whole", accumulate=2, every=100)
    seen, ckpt, last = [], None, 0
    for number, fail_at in enumerate((5, 9, 12, None)):
        part, _ = fit(prepared, tmp_path / str(number), accumulate=2, fail_at=fail_at, ckpt=ckpt, every=2)
        reached = fail_at or STEPS
        saved = reached // 2 * 2  # the newest checkpoint; what came after it is done again
        seen += part.seen[: (saved - last) * 2]
        ckpt, last = tmp_path / f"{number}/step={saved}.ckpt", saved
    assert all(torch.equal(a, b) for a, b in itertools.zip_longest(seen, whole.seen))
    assert torch.equal(part.table, whole.table)


@pytest.mark.filterwarnings("ignore")
def test_validation_through_lightning_counts_the_text(prepared):
    data, config = prepared
    module = Toy()
    trainer = lightning.Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_checkpointing=False)
    trainer.validate(module, DataModule(data, config, global_batch=4, micro_batch=4, accumulate=1, seed=0), verbose=False)
    assert module.val_bytes == data.val.meta.text_bytes


def test_without_a_trainer_there_are_no_loaders(prepared):
    data, config = prepared
    with pytest.raises(RuntimeError, match="pass it to fit or validate"):
        DataModule(data, config, global_batch=4, micro_batch=4, accumulate=1, seed=0).train_dataloader()
