"""Planned peaks against what torch really allocates in the step of the run's own optimizer."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import pytest

from hybridlm.cli.compose import compose_config
from hybridlm.memory.plan import Planner
from hybridlm.memory.timeline import StepSettings

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
WITHIN = 0.02  # a quarter of what benchmarks/plan_memory.py allows


@pytest.fixture
def real(monkeypatch):
    """benchmarks/harness/planned.py"""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("harness.planned")


def compare(real, config, step):
    steps = Planner(config).steps
    assert steps.peak(step).bytes == pytest.approx(real.RealStep(steps.work, step).peak(), rel=WITHIN)


@pytest.mark.parametrize("seed", [1, 6, 9])
def test_random_models(real, seed):
    compare(real, real.random_config(seed), real.random_step(seed))


SMALL = [
    "hardware=cpu",
    "model.d_model=64",
    "model.attention.n_heads=2",
    "data.seq_len=128",
    "data.tokenizer.vocab_size=2048",
]


@pytest.mark.parametrize(
    ("overrides", "step"),
    [
        (["model.pattern=T M T", "trainer.precision=64-true"], StepSettings(2, 1, 0, 512)),
        (["model.pattern=(T M)*3", "trainer.precision=bf16-mixed"], StepSettings(4, 2, 2, 64)),
        (
            ["model.pattern=(T X)*2", "model.variants={X: {mixer: attention, window: 16}}"],
            StepSettings(4, 1, 0, 512),
        ),  # one mask for all layers
        (
            ["model.pattern=M:mlp*6", "optim=muon", "trainer.precision=bf16-true", "model.d_model=128"],
            StepSettings(1, 3, 1, 512),
        ),
        (["model.pattern=T M1", "model.tie_embeddings=false", "model.logit_softcap=15"], StepSettings(2, 1, 1, 512)),
        (["model.pattern=(G K)*2"], StepSettings(4, 1, 0, 512)),
    ],
    ids=[
        "64-true",
        "bf16-mixed, every other layer",
        "shared mask",
        "bf16-true, Muon, accumulation",
        "untied head",
        "delta rules",
    ],
)
def test_what_changes_a_step(real, overrides, step):
    compare(real, compose_config([*SMALL, *overrides]), step)


def test_packed_documents(real, monkeypatch):
    """With as many documents as the plan assumes."""
    monkeypatch.setattr(real, "DOCUMENT", 96)  # three tokens of each stand at its beginning, one in 32
    compare(
        real,
        compose_config([*SMALL, "model.pattern=T M1 M2 M3", "data.packing=true", "data.seq_len=192"]),
        StepSettings(4, 1, 0, 512),
    )


def test_the_whole_model_followed_at_once_agrees():
    """Layers that repeat are followed once; a model in which none repeats is followed whole. With a residual scale that
    differs in nothing, layers of one kind are told apart."""
    config = compose_config([*SMALL, "model.pattern=M T M M T", "optim=adamw"])
    steps = Planner(config).steps
    work = steps.work
    told_apart = [
        replace(spec, params=replace(spec.params, norm_eps=spec.params.norm_eps * (1 + i * 1e-3)))
        for i, spec in enumerate(work.layers)
    ]
    from hybridlm.memory.microbatch import trace_microbatch
    from hybridlm.memory.optimizer import trace_optimizer
    from hybridlm.memory.timeline import DeviceShare, compose

    class Apart(type(work)):
        layers = tuple(told_apart)

    whole = Apart(**{name: getattr(work, name) for name in work.__dataclass_fields__})
    step = StepSettings(4, 1, 0, 512)
    pieces = trace_microbatch(whole, 4, checkpointed=False, accumulating=False, rows=512)
    assert len(pieces.blocks) == 5  # each kind of layer is followed once otherwise
    peak = compose(whole.layers, (pieces, pieces), trace_optimizer(work), step, DeviceShare(1, 0, 0, averaged=False))
    assert peak.bytes == pytest.approx(steps.peak(step).bytes, rel=0.001)


def test_a_run_of_the_trainer_holds_no_more(real, tmp_path, monkeypatch):
    """Lightning's loop around the step: what it and its callbacks hold besides is less than a twentieth."""
    from harness.memory import peak_bytes

    from hybridlm.memory.plan import plan_run
    from hybridlm.runs.run_folder import RunFolder
    from hybridlm.train.run import run

    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(8):
        (corpus / f"{i}.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400, encoding="utf-8")
    config = compose_config(
        [
            *SMALL,
            "model.pattern=T M M T",
            "model.d_model=128",
            "data=files",
            f"data.path={corpus}/*.txt",
            f"data.out={tmp_path / 'prepared'}",
            "data.tokenizer.kind=bytes",
            "data.global_batch=16",
            "trainer.max_steps=2",
            "trainer.val_every=null",
            "callbacks=none",
            "optim=adamw",
        ]
    )
    plan = plan_run(config)
    real_bytes = peak_bytes(lambda: run(config, RunFolder(tmp_path / "run"), None))
    assert real_bytes == pytest.approx(plan.peak.bytes, rel=0.05)
    assert "fits" in (tmp_path / "run/plan.txt").read_text(encoding="utf-8")
