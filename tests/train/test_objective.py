"""DPO on top of given weights: it starts from ln 2, learns to tell chosen from rejected, resumes exactly, and reads the
given weights once."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch

from hybridlm.cli.compose import compose_config
from hybridlm.cli.start import main
from hybridlm.data.preparing.prepare import prepare
from hybridlm.data.windows.pairs import PairWindows
from hybridlm.memory.plan import plan_run
from hybridlm.model.build import fresh_model
from hybridlm.runs.checkpoint import load_run, read_checkpoint, weights_of
from hybridlm.runs.run_folder import RunFolder
from hybridlm.train.objective import NextToken, Preferences, log_probabilities

CPU = torch.device("cpu")
TRAIN = Path(__file__).parents[2] / "train.py"
LETTERS = "abcdefgh"


@pytest.fixture(scope="module")
def source(tiny, tmp_path_factory):
    """A run on text, its tokenizer without special tokens."""
    place = tmp_path_factory.mktemp("place")
    with redirect_stdout(io.StringIO()):
        main([*tiny, "callbacks=none", "trainer.max_steps=4", f"hydra.run.dir={place}/text"])
    return RunFolder(place / "text")


@pytest.fixture(scope="module")
def pairs(tiny, tmp_path_factory):
    """Overrides of a run that learns to answer with the letter that was asked for, not with the next one."""
    place = tmp_path_factory.mktemp("pairs")
    records = [
        {"prompt": f"{i} {LETTERS[i % 8]}", "chosen": LETTERS[i % 8], "rejected": LETTERS[(i + 1) % 8] * 2}
        for i in range(80)
    ]
    (place / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    keep = ("data.val_f", "data.global", "hardware", "trainer")
    settings = [line for line in tiny if line.startswith(keep)]
    own = [f"data.path={place}/pairs.jsonl", "data.seq_len=16", "optim.lr=1e-2", "callbacks=none"]
    return [*settings, "data=preferences", "optim=dpo", *own]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYBRIDLM_CACHE", str(tmp_path / "cache"))
    return tmp_path


def train(*arguments):
    with redirect_stdout(io.StringIO()) as printed:
        main(list(arguments))
    return printed.getvalue()


def rows(name):
    return [json.loads(line) for line in RunFolder(name).metrics_jsonl.read_text().splitlines()]


def kept(place):
    return sorted((place / "cache").rglob("*-reference-*.json"))


@pytest.fixture
def new(place):
    return "new"


def test_it_starts_at_ln_2_and_learns_what_is_preferred(source, pairs, place, new):
    printed = train(*pairs, f"init_from={source.path}", f"hydra.run.dir={new}", "trainer.max_steps=60", "seed=1")
    found = rows(place / new)
    first = next(row for row in found if "train/loss" in row)
    assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["train/margin"] == pytest.approx(0, abs=1e-6)
    last = [row for row in found if "val/loss" in row][-1]
    assert last["val/loss"] < 0.3
    assert last["val/accuracy"] == 1
    assert last["val/margin"] == pytest.approx(last["val/reward_chosen"] - last["val/reward_rejected"])
    assert not any(name.endswith(("bpb", "ppl")) for row in found for name in row)
    summary = json.loads(RunFolder(place / new).summary.read_text())
    assert summary["tokens"] == 60 * 4 * 2 * 16
    assert summary["val/accuracy"] == 1
    assert "ranked right" in printed
    assert len(kept(place)) == 2


def test_the_reference_is_that_of_the_given_weights(source, pairs, place, new):
    train(*pairs, f"init_from={source.path}", f"hydra.run.dir={new}", "optim.lr=1e-30", "trainer.max_steps=1")
    run = load_run(str(place / new), CPU)  # unchanged weights
    prepared = prepare(compose_config([*pairs, f"init_from={source.path}"]).data)
    windows = PairWindows(prepared.parts[0].val, 16, 0)
    batch = windows.rows(np.arange(windows.numbers))
    with torch.no_grad():
        losses = run.model(torch.from_numpy(batch.ids), targets=torch.from_numpy(batch.targets), each=True)
    numbers = json.loads(next(path for path in kept(place) if path.name.startswith("val")).read_text())
    want = log_probabilities(losses).view(-1, 2)
    assert torch.allclose(torch.tensor(numbers["facts"]["log_probabilities"], dtype=torch.float64), want, atol=1e-5)


def test_it_resumes_exactly_without_the_given_weights(source, pairs, place, new, monkeypatch):
    shutil.copytree(source.path, place / "text")
    whole = [*pairs, "init_from=text", "optim.schedule=constant", "optim.warmup=0", "trainer.max_steps=6"]
    train(*whole, "hydra.run.dir=whole")
    files = {path: path.read_bytes() for path in kept(place)}
    train(*whole, f"hydra.run.dir={new}", "trainer.max_steps=3")
    monkeypatch.setattr("hybridlm.train.reference.given_weights", lambda config: pytest.fail("read again"))
    shutil.move("text", "gone")
    train(f"ckpt={new}", "trainer.max_steps=6")
    assert {path: path.read_bytes() for path in kept(place)} == files
    ends = [weights_of(read_checkpoint(RunFolder(place / name).step_checkpoint(6))) for name in ("whole", new)]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_a_reference_that_was_deleted_is_computed_again_from_the_same_weights_only(source, pairs, place, new, capfd):
    shutil.copytree(source.path, place / "text")
    train(*pairs, "init_from=text", f"hydra.run.dir={new}", "trainer.max_steps=2")
    before = [path.read_bytes() for path in kept(place)]

    def refused(said):
        for path in kept(place):
            path.unlink()
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main([f"ckpt={new}", "trainer.max_steps=4"])
        lines = capfd.readouterr().err.strip().splitlines()
        assert (end.value.code, len(lines)) == (2, 1)
        assert said in lines[0]

    shutil.move("text", "gone")
    refused("init_from")
    train(*pairs, "init_from=gone", "hydra.run.dir=other", "trainer.max_steps=2")
    os.rename("other", "text")
    shutil.copy("text/checkpoints/step-00000002.ckpt", "text/checkpoints/step-00000004.ckpt")
    refused("changed since")
    shutil.rmtree("text")
    shutil.move("gone", "text")
    train(f"ckpt={new}", "trainer.max_steps=4")
    assert [path.read_bytes() for path in kept(place)] == before


def test_more_ids_have_a_reference_of_their_own(tiny, pairs, place):
    """The probabilities of all others are smaller then."""
    train(*tiny, "callbacks=none", "trainer.max_steps=1", "model.vocab_size=800", "hydra.run.dir=text")
    for name, more in (("few", []), ("many", ["model.vocab_size=3000"])):
        train(*pairs, "init_from=text", f"hydra.run.dir={name}", "trainer.max_steps=1", *more)
        first = next(row for row in rows(place / name) if "train/loss" in row)
        assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_another_objective_is_another_run(source, pairs, place, new, capfd):
    train(*pairs, f"init_from={source.path}", f"hydra.run.dir={new}", "trainer.max_steps=1")
    with pytest.raises(SystemExit) as end:
        main([f"ckpt={new}", "optim.objective=next_token", "trainer.max_steps=2"])
    assert end.value.code == 2
    assert "optim.objective" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (["optim=adamw", "init_from=text"], ["optim.objective", "optim=dpo"]),
        ([], ["init_from"]),
        (["init_from=text", "data.packing=true"], ["data.packing"]),
    ],
)
def test_what_does_not_fit_together_is_refused(source, pairs, place, capfd, change, parts):
    shutil.copytree(source.path, place / "text")
    with pytest.raises(SystemExit) as end:
        main([*pairs, *change, "hydra.run.dir=new"])
    said = capfd.readouterr().err.strip().splitlines()
    assert (end.value.code, len(said)) == (2, 1)
    assert all(part in said[0] for part in parts)
    assert not os.path.exists("new")


def test_the_gradient_of_a_model_is_that_of_its_log_probabilities(tiny):
    """In float64, against the loss by hand on log-probabilities from the logits."""
    model = fresh_model(compose_config([*tiny]).model, 40, seed=0, device=CPU).double()
    generator = torch.Generator().manual_seed(0)
    ids, targets = (torch.randint(0, 40, (6, 9), generator=generator) for _ in range(2))
    targets[:, :4] = -100
    targets[4:] = -100  # padding of a last batch
    reference = -20 * torch.rand(6, generator=generator, dtype=torch.float64)
    found = Preferences(0.2).losses(model, {"ids": ids, "targets": targets, "reference": reference})
    found.total.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    logs = model(ids).logits.log_softmax(-1)
    picked = logs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1) * (targets >= 0)
    ratios = picked.sum(1) - reference
    want = sum(-torch.log(torch.sigmoid(0.2 * (ratios[i] - ratios[i + 1]))) for i in (0, 2))
    want.backward()
    assert found.loss.item() == pytest.approx(want.item(), rel=1e-12)
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        assert torch.allclose(gradient, parameter.grad, rtol=1e-9, atol=1e-13)
    sums = Preferences(0.2).sums(model, {"ids": ids, "targets": targets, "reference": reference})
    assert sums[:3].tolist() == [pytest.approx(want.item()), 2, 0]
    assert NextToken().losses(model, {"ids": ids, "targets": targets}).measured is None


def test_the_plan_counts_both_rows(tiny, pairs):
    settings = [line for line in tiny if line.startswith("model")] + ["data.tokenizer.kind=bytes"]
    pair = plan_run(compose_config([*settings, *pairs, "data.batch_size=2", "data.global_batch=2"]))
    kept = [line for line in pairs if not line.startswith(("data=", "optim="))]
    twice = ["optim=adamw", "data=chat", "data.packing=false", "data.batch_size=4", "data.global_batch=4"]
    one = plan_run(compose_config([*settings, *kept, *twice]))
    assert pair.tokens == one.tokens
    assert pair.peak.bytes == pytest.approx(one.peak.bytes, rel=0.1)  # logits of a chunk take somewhat more


@pytest.mark.slow
def test_two_ranks_learn_what_one_does(source, pairs, place, environment):
    losses = {}
    for name, extra in {"one": [], "ddp": ["ddp"], "fsdp2": ["fsdp2"]}.items():
        ranks = [f"trainer.strategy={strategy}" for strategy in extra] + ["trainer.devices=2"] * len(extra)
        own = [f"init_from={source.path}", f"hydra.run.dir={name}", "trainer.max_steps=4", "optim.warmup=0", *ranks]
        done = subprocess.run(
            [sys.executable, str(TRAIN), *pairs, *own], cwd=place, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        losses[name] = [
            row[key] for row in rows(place / name) for key in sorted(row) if key.startswith(("train/", "val/"))
        ]
    for name in ("ddp", "fsdp2"):
        assert losses[name] == pytest.approx(losses["one"], abs=1e-4)
