"""Muon with sharded matrices: two ranks train as one."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hybridlm.cli.compose import compose_config
from hybridlm.runs.checkpoint import load_run, read_checkpoint
from hybridlm.runs.run_folder import RunFolder
from hybridlm.train.run import run

TRAIN = Path(__file__).parents[2] / "train.py"


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_ranks_with_shards_train_as_one_and_resume(tiny, tmp_path, environment):
    """With experts and a fused projection, whose blocks are orthogonalised apart; d_ff is odd, so that shards are
    uneven."""
    arguments = [
        "optim=muon",
        "optim.eps=1e-3",
        "model.pattern=T:moe M T",
        "model.moe.n_experts=3",
        "model.moe.d_expert=24",
    ]
    arguments += [
        "model.moe.balance_loss_weight=0",
        "model.mlp.d_ff=49",
        "trainer.log_every=1",
        "trainer.val_every=null",
    ]
    arguments = [*tiny, *arguments, "trainer.max_steps=6", "trainer.ckpt_every=3"]
    two, one = RunFolder(tmp_path / "two"), RunFolder(tmp_path / "one")

    def on_two_ranks(*more: str) -> None:
        line = [sys.executable, str(TRAIN), *arguments, "trainer.devices=2", "trainer.strategy=fsdp2", *more]
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]

    on_two_ranks(f"hydra.run.dir={two.path}")
    run(compose_config(arguments), one, None)
    for mine, its in zip(rows(two.path), rows(one.path), strict=True):
        assert mine["train/loss"] == pytest.approx(its["train/loss"], rel=1e-5)
    trained = load_run(str(two.path), torch.device("cpu")).model.state_dict()
    for name, tensor in load_run(str(one.path), torch.device("cpu")).model.state_dict().items():
        torch.testing.assert_close(trained[name], tensor, rtol=1e-4, atol=1e-5)

    whole = copy.deepcopy(read_checkpoint(two.step_checkpoint(6)))  # the file goes
    two.step_checkpoint(6).unlink()
    on_two_ranks(f"hydra.run.dir={two.path}", "ckpt=last")
    again = read_checkpoint(two.step_checkpoint(6))
    assert all(torch.equal(again["state_dict"][name], tensor) for name, tensor in whole["state_dict"].items())
    for number, state in whole["optimizer_states"][0]["state"].items():
        assert all(
            torch.equal(again["optimizer_states"][0]["state"][number][name], value) for name, value in state.items()
        )
