"""Compiled blocks learn what others do, in a run with everything in it; their checkpoints are the same; where torch
cannot, it is said."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run_ends import assert_equal

from hybridlm.cli.compose import compose_config
from hybridlm.model.build import fresh_model
from hybridlm.runs.checkpoint import read_checkpoint
from hybridlm.runs.run_folder import RunFolder
from hybridlm.train.compiled import compile_blocks, eager
from hybridlm.train.run import run

TRAIN = Path(__file__).parents[2] / "train.py"
# Without a large eps AdamW's first step is the sign of a gradient, and rounding decides on some of them.
FIVE = [
    "trainer.max_steps=5",
    "trainer.log_every=1",
    "trainer.val_every=2",
    "trainer.ckpt_every=2",
    "optim=adamw",
    "optim.eps=1e-3",
]
MOE = ["model.moe.n_experts=4", "model.moe.d_expert=24", "model.moe.router=sigmoid"]
CASES = {
    "mamba2 and attention, checkpointed": ["trainer.checkpoint_blocks=1", "callbacks=ema"],
    "experts, packed": [
        "model.pattern=T:moe M:moe",
        *MOE,
        "data.path=CORPUS/lines.jsonl",
        "data.packing=true",
        "data.seq_len=700",
    ],
    "experts, checkpointed": ["model.pattern=T:moe T", *MOE, "trainer.checkpoint_blocks=2", "trainer.accumulate=2"],
    "mamba3 and mla": ["model.pattern=M3 L", "model.mamba3.head_dim=16", "model.mamba3.d_state=8"],
    "mamba1": ["model.pattern=M1 T"],
}


def metrics(folder: RunFolder) -> dict[str, float]:
    rows = [json.loads(line) for line in folder.metrics_jsonl.read_text().splitlines()]
    return {
        f"{row['step']} {name}": row[name]
        for row in rows
        for name in ("train/loss", "val/loss", "val/ema_bpb")
        if name in row
    }


def compiled_frames() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_compiling_in_place_keeps_parameter_names():
    config = compose_config(["model.pattern=MT", "size=tiny"])
    one, other = (fresh_model(config.model, 64, seed=0, device="cpu") for _ in range(2))
    compile_blocks(one)
    assert list(one.state_dict()) == list(other.state_dict())
    with eager(one), torch.no_grad():
        ids = torch.arange(8).view(1, 8)
        assert torch.equal(one(ids).logits, other(ids).logits)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_compiled_losses_equal_eager_ones_and_checkpoints_are_interchangeable(tiny, corpus, tmp_path, case):
    """Training and validation, on the way and at the end, whose lengths differ from those of training."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    settings = [*tiny, *FIVE, *(setting.replace("CORPUS", str(corpus)) for setting in CASES[case])]
    plain, fast = RunFolder(tmp_path / "plain"), RunFolder(tmp_path / "fast")
    run(compose_config(settings), plain, None)
    assert compiled_frames() == 0
    run(compose_config([*settings, "trainer.compile=true"]), fast, None)
    assert compiled_frames() > 2
    assert metrics(fast) == pytest.approx(metrics(plain), rel=1e-4)
    ours, theirs = (read_checkpoint(folder.step_checkpoint(4)) for folder in (fast, plain))
    assert list(ours["state_dict"]) == list(theirs["state_dict"])
    assert_equal(ours["hybridlm"], theirs["hybridlm"], "hybridlm")
    whole = metrics(plain)
    run(compose_config(settings), fast, fast.step_checkpoint(4))
    run(compose_config([*settings, "trainer.compile=true"]), plain, plain.step_checkpoint(4))
    assert metrics(fast) == pytest.approx(whole, rel=1e-4)
    assert metrics(plain) == pytest.approx(whole, rel=1e-4)


@pytest.mark.slow
def test_a_missing_compiler_is_refused_in_one_line(tiny, tmp_path, environment):
    environment |= {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    line = [
        sys.executable,
        str(TRAIN),
        *tiny,
        "hardware=cpu",
        "trainer.compile=true",
        f"hydra.run.dir={tmp_path / 'run'}",
    ]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr[-2000:]
    (said,) = [text for text in done.stderr.splitlines() if "trainer.compile = true: torch cannot compile here" in text]
    assert "or take false" in said
    assert "Traceback" not in done.stderr
