"""Resume through Lightning itself: what a stopped and resumed fit reads and learns is bit for bit what an uninterrupted
one does."""

import itertools
from dataclasses import replace
from pathlib import Path

import lightning
import pytest
import torch
from fits import Toy, fit, fits_of_a_rank
from forks import run_ranks
from streams import part, prepared

from hybridlm.config.data import DataConfig
from hybridlm.config.synthetic import SyntheticConfig
from hybridlm.data.datamodule import DataModule
from hybridlm.data.synthetic.source import open_synthetic
from hybridlm.errors import UserError

STEPS = 16
CONFIG = DataConfig(seq_len=8)
SYNTHETIC = DataConfig(
    source="synthetic", seq_len=8, synthetic=SyntheticConfig(n_pairs=1, min_length=5, examples=40, val_examples=4)
)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """What is trained on, and how, by name."""
    folder = tmp_path_factory.mktemp("corpora")
    one, other = part(folder, "one", 2.0, train=16), part(folder, "other", 1.0, train=9, val=5, seed=1)
    packing = CONFIG.model_copy(update={"packing": True})
    return {
        "cut": (prepared(one), CONFIG),
        "packed": (prepared(one), packing),
        "mixture": (prepared(replace(one, weight=1.0), other), CONFIG),
        "packed mixture": (prepared(one, other), packing),
        "synthetic": (open_synthetic(SYNTHETIC, Path, lambda line: None, False), SYNTHETIC),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "accumulate"), [("cut", 1), ("cut", 2), ("packed", 2), ("mixture", 1), ("synthetic", 2)]
)
def test_a_resumed_fit_is_bit_exact(corpora, tmp_path, kind, accumulate):
    whole, datamodule = fit(corpora[kind], STEPS, tmp_path / "whole", accumulate=accumulate, val_every=3)
    assert len(whole.seen) == STEPS * accumulate
    per_epoch = len(datamodule.trainer.train_dataloader) // accumulate
    assert 3 <= per_epoch <= 7  # stops below fall inside epochs and on their ends
    for stop in (per_epoch - 1, per_epoch, 2 * per_epoch, STEPS - 1):
        torch.manual_seed(stop)  # nothing may hang on the global generator
        resumed, _ = fit(
            corpora[kind],
            STEPS,
            tmp_path / f"resumed{stop}",
            accumulate=accumulate,
            ckpt=tmp_path / f"whole/step={stop}.ckpt",
            every=100,
            val_every=3,
        )
        rest = whole.seen[stop * accumulate :]
        assert len(resumed.seen) == len(rest), stop
        assert all(torch.equal(a, b) for a, b in zip(resumed.seen, rest, strict=True)), stop
        assert torch.equal(resumed.table, whole.table), stop


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_killed_repeatedly_still_sees_every_batch(corpora, tmp_path, workers):
    whole, _ = fit(corpora["cut"], STEPS, tmp_path / "whole", accumulate=2, every=100)
    seen, ckpt, last = [], None, 0
    for number, fail_at in enumerate((5, 9, 12, None)):
        latest, _ = fit(
            corpora["cut"],
            STEPS,
            tmp_path / str(number),
            accumulate=2,
            fail_at=fail_at,
            ckpt=ckpt,
            every=2,
            workers=workers,
        )
        reached = fail_at or STEPS
        saved = reached // 2 * 2  # the newest checkpoint; what came after it is done again
        seen += latest.seen[: (saved - last) * 2]
        ckpt, last = tmp_path / f"{number}/step={saved}.ckpt", saved
    assert all(torch.equal(a, b) for a, b in itertools.zip_longest(seen, whole.seen))
    assert torch.equal(latest.table, whole.table)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["cut", "packed", "mixture", "packed mixture"])
def test_validation_through_lightning_counts_the_text(corpora, kind):
    data, config = corpora[kind]
    module = Toy()
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    trainer.validate(
        module, DataModule(data, config, global_batch=4, micro_batch=4, accumulate=1, seed=0), verbose=False
    )
    assert module.val_bytes == sum(one.val.text_bytes for one in data.parts)
    assert module.val_documents == ("packed" in kind)


def test_a_part_that_is_too_short_is_named(tmp_path):
    parts = part(tmp_path, "long", train=20), part(tmp_path, "short", train=1, seed=2)
    config = DataConfig(seq_len=60)
    datamodule = DataModule(prepared(*parts), config, global_batch=4, micro_batch=4, accumulate=1, seed=0)
    datamodule.trainer = lightning.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    with pytest.raises(UserError, match=r"data\.parts\.short: .* \d+ tokens, .* data\.seq_len"):
        datamodule.train_dataloader()


def test_without_a_trainer_there_are_no_loaders(corpora):
    data, config = corpora["cut"]
    with pytest.raises(RuntimeError, match="pass it to fit or validate"):
        DataModule(data, config, global_batch=4, micro_batch=4, accumulate=1, seed=0).train_dataloader()


SOME_STEPS = 8


@pytest.mark.filterwarnings("ignore")
def test_ranks_workers_and_resuming_change_no_global_batch(corpora, tmp_path):
    """Same seed, 1 rank or 2 (gloo), 0 or 2 workers, resumed at any step: the same global batches, bit for bit."""
    data, config = corpora["mixture"]
    wanted = fit((data, config), SOME_STEPS, tmp_path / "one", accumulate=2)[0].seen
    steps = [torch.cat(wanted[2 * step : 2 * step + 2]) for step in range(SOME_STEPS)]
    for workers, stop in itertools.product((0, 2), (0, 3, 7)):  # 7: the end of an epoch
        ckpt = tmp_path / f"one/step={stop}.ckpt" if stop else None
        seen = fit((data, config), SOME_STEPS, tmp_path / "again", accumulate=2, ckpt=ckpt, every=100, workers=workers)[
            0
        ].seen
        assert all(torch.equal(a, b) for a, b in zip(seen, wanted[2 * stop :], strict=True)), (workers, stop)

    assert run_ranks(lambda rank, port: fits_of_a_rank((data, config), SOME_STEPS, tmp_path / "two")) == [0, 0]
    ranks = [torch.load(tmp_path / f"two/rank{rank}.pt") for rank in range(2)]
    assert set(ranks[0]) == {f"{workers} {stop}" for workers in (0, 2) for stop in range(SOME_STEPS)}
    for name in ranks[0]:
        parts = [rank[name] for rank in ranks]
        stop = int(name.split()[1])
        assert len(parts[0]) == len(parts[1]) == 2 * (SOME_STEPS - stop)
        for step in range(SOME_STEPS - stop):
            together = torch.cat([ids for part in parts for ids in part[2 * step : 2 * step + 2]])
            assert torch.equal(together, steps[stop + step]), (name, step)
