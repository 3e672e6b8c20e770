"""Whole runs of synthetic tasks: what they measure, resumed runs, and that small models learn what their layers can."""

from __future__ import annotations

import json

import pytest
import torch

from hybridlm.cli.compose import compose_config
from hybridlm.config.synthetic import words
from hybridlm.data.synthetic.source import held_out
from hybridlm.errors import UserError
from hybridlm.runs.checkpoint import load_run
from hybridlm.runs.run_folder import RunFolder
from hybridlm.train.run import run

BASE = [
    "data=synthetic",
    "size=tiny",
    "hardware=cpu",
    "callbacks=none",
    "model.pattern=MT",
    "model.n_layers=2",
    "model.d_model=32",
    "model.attention.head_dim=16",
    "model.mamba2.head_dim=16",
    "data.seq_len=24",
    "data.global_batch=8",
    "data.synthetic.val_examples=20",
    "data.synthetic.eval_lengths=[40]",
    "trainer.max_steps=6",
    "trainer.log_every=1",
    "trainer.val_every=3",
    "trainer.ckpt_every=3",
]


def rows(folder):
    return [json.loads(line) for line in folder.metrics_jsonl.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = RunFolder(tmp_path_factory.mktemp("run") / "a")
    config = compose_config([*BASE, "callbacks.ema.decay=0.9"])
    return folder, config, run(config, folder, None)


def test_validation_reports_right_answers_by_length_and_no_bits_per_byte(finished):
    folder, _, summary = finished
    names = {
        "loss",
        "accuracy",
        "exact",
        "ema_loss",
        *(f"{what}/{n}" for what in ("loss", "accuracy", "exact") for n in (24, 40)),
    }
    assert {name for name in summary if name.startswith("val/")} == {f"val/{name}" for name in names}
    for row in rows(folder):
        assert not {"val/bpb", "train/bpb", "val/ema_bpb"} & set(row)
    validated = [row for row in rows(folder) if "val/loss" in row]
    assert [row["step"] for row in validated] == [3, 6]
    assert summary["val/loss"] == pytest.approx(summary["val/loss/24"], rel=1e-5)
    assert summary["val/accuracy"] == summary["val/accuracy/24"]
    best = min(validated, key=lambda row: row["val/loss"])
    assert [path.name for path in folder.best_checkpoints()] == [f"best-{best['step']:08d}.ckpt"]


def test_the_figures_are_those_of_the_saved_model_on_the_held_out_examples(finished):
    folder, config, summary = finished
    loaded = load_run(str(folder.path), torch.device("cpu"))
    assert loaded.tokenizer.vocab_size == loaded.model.vocab_size == len(words(config.data.synthetic))
    for windows in held_out(config.data):
        examples = windows.rows(torch.arange(20).numpy())
        with torch.no_grad():
            given = loaded.model(torch.from_numpy(examples.ids)).logits.argmax(-1).numpy()
        asked = examples.targets >= 0
        right = (given == examples.targets) & asked
        length = windows.seq_len
        assert summary[f"val/accuracy/{length}"] == pytest.approx(right.sum() / asked.sum())
        assert summary[f"val/exact/{length}"] == pytest.approx((right.sum(axis=1) == asked.sum(axis=1)).mean())


def test_samples_are_examples_with_the_models_answers(finished):
    folder, _, _ = finished
    texts = folder.samples.read_text().split("\n\n----------------\n\n")
    assert [text.count("[v") for text in texts] == [4, 4, 4]


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    folder = RunFolder(tmp_path / "b")
    steady = ["optim.schedule=constant", "optim.warmup=1"]
    run(compose_config([*BASE, "trainer.max_steps=3", *steady]), folder, None)
    run(compose_config([*BASE, *steady]), folder, folder.step_checkpoint(3))
    other = RunFolder(tmp_path / "c")
    run(compose_config([*BASE, *steady]), other, None)
    names = ("step", "train/loss", "val/loss", "val/accuracy", "val/loss/40")
    assert [[row.get(name) for name in names] for row in rows(folder)] == [
        [row.get(name) for name in names] for row in rows(other)
    ]


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["data=synthetic", "data.synthetic.n_pairs=40"], "data.synthetic.n_pairs = 40: vocab_size 64 has 32 keys"),
        (
            ["data=synthetic", "data.seq_len=8", "data.synthetic.eval_lengths=[]"],
            "data.seq_len = 8: an example of task=mqar takes 16 tokens",
        ),
        (
            ["data=synthetic", "data.synthetic.min_length=65"],
            "data.synthetic.min_length = 65: more than data.seq_len = 64",
        ),
        (["data=synthetic", "data.synthetic.eval_lengths=[64,64]"], "eval_lengths = [64, 64]"),
        (["data=synthetic", "data.synthetic.eval_lengths=7"], "expected a list of integers"),
        (["data=synthetic", "data.synthetic.task=recall"], "not one of mqar, copying"),
        (["data=synthetic", "data.packing=true"], "data.packing = true: data.source=synthetic has no documents"),
        (["data=synthetic", "data.val_seq_len=64"], "validates at data.seq_len and data.synthetic.eval_lengths"),
        (["data=synthetic", "data.path=x"], "data.source=synthetic does not read it"),
        (["data=synthetic", "callbacks=probes"], "callbacks.probes.every = 1: "),
        (["data.synthetic.task=parity"], "data.synthetic: only data.source=synthetic reads it; add data=synthetic"),
        (["callbacks=probes", "trainer.val_every=null"], "callbacks.probes.every = 1: counts validations"),
        (["callbacks=probes", "callbacks.probes.length=8"], "callbacks.probes.length = 8: expected an integer >= 32"),
    ],
)
def test_mistakes_are_reported_in_one_line(overrides, part):
    with pytest.raises(UserError) as error:
        compose_config(overrides)
    assert [problem for problem in error.value.problems if part in problem], error.value.problems


def test_a_vocabulary_that_is_too_small_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"model\.vocab_size = 10: smaller than the tokenizer's 65"):
        run(compose_config([*BASE, "model.vocab_size=10"]), RunFolder(tmp_path / "a"), None)


LEARNING = [
    "data=synthetic",
    "size=tiny",
    "hardware=cpu",
    "callbacks=none",
    "model.n_layers=2",
    "data.global_batch=32",
    "trainer.val_every=null",
]


@pytest.mark.slow
def test_two_attention_layers_learn_induction(tmp_path):
    task = [
        "data.synthetic.task=induction",
        "data.synthetic.vocab_size=8",
        "data.seq_len=16",
        "data.synthetic.eval_lengths=[]",
    ]
    model = [
        "model.pattern=T*2",
        "model.attention.rope=true",
        "optim.lr=3e-3",
        "optim.muon.lr=0.005",
        "trainer.max_steps=150",
    ]
    assert (
        run(compose_config([*LEARNING, *task, *model]), RunFolder(tmp_path / "a"), None)["val/accuracy"] > 0.8
    )  # chance 1/8


@pytest.mark.slow
def test_two_mamba3_layers_learn_parity_and_extrapolate(tmp_path):
    task = ["data.synthetic.task=parity", "data.seq_len=24", "data.synthetic.eval_lengths=[32]"]
    model = [
        "model.pattern=M3:none*2",
        "model.mamba3={d_state: 64, rope_fraction: 1.0, dt_range: [0.1, 1.0]}",
        "optim=adamw",
        "optim.lr=3e-3",
    ]
    summary = run(compose_config([*LEARNING, *task, *model, "trainer.max_steps=200"]), RunFolder(tmp_path / "a"), None)
    assert summary["val/accuracy"] > 0.9  # chance 1/2
    assert summary["val/accuracy/32"] > 0.8
