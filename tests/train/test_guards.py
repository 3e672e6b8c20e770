"""Steps that go wrong: skipped, named, survived, undone; on every rank alike; and the same after a resume."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hybridlm.cli.compose import compose_config
from hybridlm.cli.user_error import reported
from hybridlm.config.train import GuardConfig
from hybridlm.layers.mamba2 import Mamba2
from hybridlm.model.build import fresh_model
from hybridlm.optim.optimizer import HybridOptimizer, model_groups
from hybridlm.runs.checkpoint import read_checkpoint
from hybridlm.runs.run_folder import RunFolder
from hybridlm.train import guards
from hybridlm.train.guards import RunDiverged
from hybridlm.train.lightning_module import LitLM, propagate_non_finite
from hybridlm.train.run import run

# Layer 5 is the second Mamba-2; a checkpoint every second step, a line every step.
DEEP = [
    "model.pattern=MTTTTMT",
    "trainer.log_every=1",
    "trainer.val_every=null",
    "trainer.ckpt_every=2",
    "trainer.keep_last=3",
]
EXACT = ("step", "train/loss", "optim/lr", "optim/grad_norm", "optim/skipped_steps")


def rows(folder: RunFolder) -> list[dict]:
    found = [json.loads(line) for line in folder.metrics_jsonl.read_text().splitlines()]
    return [{key: repr(row.get(key)) for key in EXACT} for row in found]


@pytest.fixture
def plant(monkeypatch):
    """``plant({step: kind})`` spoils these 1-based steps: "output" of layer 5, "gradient" of it alone, or the "loss",
    infinite with finite gradients; in the last micro-batch of the step."""
    steps: dict[int, str] = {}
    now = {"kind": ""}
    training_step, mixer_forward = LitLM.training_step, Mamba2.forward

    def step(self, batch, batch_idx):
        due = self.trainer.accumulate_grad_batches - 1 == batch_idx % self.trainer.accumulate_grad_batches
        now["kind"] = steps.get(self.trainer.global_step + 1, "") if due else ""
        now["layer"] = self.model.blocks[5].mixer
        output = training_step(self, batch, batch_idx)
        if now["kind"] == "loss":
            output["loss"] = propagate_non_finite(
                output["loss"] + math.inf
            )  # a constant: by itself it would leave the gradients alone
        return output

    def forward(self, *args, **kwargs):
        y = mixer_forward(self, *args, **kwargs)
        if self is now.get("layer"):
            if now["kind"] == "output":
                y = y * torch.tensor(math.nan)
            if now["kind"] == "gradient":
                y.register_hook(lambda gradient: gradient * math.nan) if y.requires_grad else None
        return y

    monkeypatch.setattr(LitLM, "training_step", step)
    monkeypatch.setattr(Mamba2, "forward", forward)
    return steps.update


@pytest.mark.parametrize("extra", [["optim=adamw"], ["optim=muon", "trainer.accumulate=2"]])
def test_a_batch_that_gives_nan_in_layer_5_is_skipped_and_explained(tiny, tmp_path, capsys, monkeypatch, plant, extra):
    plant({3: "output"})
    seen = {}
    on_end = guards.GuardCallback.on_train_batch_end

    def look(self, trainer, module, *args):
        on_end(self, trainer, module, *args)
        optimizer = guards.hybrid_optimizer(trainer)
        state = [value.clone() for values in optimizer.state.values() for value in values.values()]
        seen[trainer.global_step] = [parameter.detach().clone() for parameter in module.parameters()] + state

    monkeypatch.setattr(guards.GuardCallback, "on_train_batch_end", look)
    folder = RunFolder(tmp_path / "run")
    run(compose_config([*tiny, *DEEP, *extra]), folder, None)
    said = [line for line in capsys.readouterr().out.splitlines() if "skipped:" in line]
    assert said == [
        "warning     step 3 skipped: the output of layer 5 (blocks.5.mixer) is not finite; 1 in a row, 1 in all"
    ]
    assert all(torch.equal(a, b) for a, b in zip(seen[3], seen[2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seen[4], seen[3], strict=True))
    assert all(
        bool(tensor.isfinite().all()) for tensor in read_checkpoint(folder.newest_checkpoint())["state_dict"].values()
    )
    logged = {int(row["step"]): row for row in rows(folder)}
    assert len(logged) == 12
    assert logged[3]["optim/grad_norm"] == "None", "JSON has no NaN"
    assert [float(logged[step]["optim/skipped_steps"]) for step in (2, 3, 12)] == [0, 1, 1]
    assert json.loads(folder.summary.read_text())["val/bpb"] < 8


@pytest.mark.parametrize(
    ("kind", "named"),
    [("gradient", "the gradient of layer 5 (blocks.5.mixer.out_proj.weight)"), ("loss", "the gradient of norm.weight")],
)
def test_a_gradient_and_an_infinite_loss_are_bad_as_well(tiny, tmp_path, capsys, plant, kind, named):
    """The planted loss is not the model's own, so that looking again finds only what it made of the gradients."""
    plant({3: kind})
    folder = RunFolder(tmp_path / "run")
    run(compose_config([*tiny, *DEEP, "trainer.max_steps=4"]), folder, None)
    assert f"step 3 skipped: {named} is not finite" in capsys.readouterr().out


def test_three_in_a_row_roll_back_and_the_same_after_a_resume(tiny, tmp_path, capsys, plant):
    """Steps 6 to 8 are bad; the checkpoint of step 4 comes back. Resumed from step 6, which lies within them."""
    plant(dict.fromkeys((6, 7, 8), "output"))
    config = compose_config([*tiny, *DEEP, "trainer.keep_last=9"])
    whole, broken = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "broken")
    run(config, whole, None)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "rollback" in line)
    assert all(part in line for part in ("steps 6 to 8", "step 4 ", " 0.5 ", "rollback 1 of at most 2"))
    four, eight, twelve = (read_checkpoint(whole.step_checkpoint(step)) for step in (4, 8, 12))
    assert all(torch.equal(tensor, eight["state_dict"][name]) for name, tensor in four["state_dict"].items())
    for mine, its in zip(
        four["optimizer_states"][0]["state"].values(), eight["optimizer_states"][0]["state"].values(), strict=True
    ):
        assert all(torch.equal(mine[name], tensor) for name, tensor in its.items())
    assert four["optimizer_states"][0]["param_groups"][0]["lr"] != eight["optimizer_states"][0]["param_groups"][0]["lr"]

    shutil.copytree(whole.path, broken.path)
    for step in (8, 10, 12):
        broken.step_checkpoint(step).unlink()
    run(config, broken, broken.step_checkpoint(6))
    assert rows(broken) == rows(whole)
    again = read_checkpoint(broken.step_checkpoint(12))
    assert all(torch.equal(tensor, again["state_dict"][name]) for name, tensor in twelve["state_dict"].items())
    assert again["callbacks"]["GuardCallback"] == twelve["callbacks"]["GuardCallback"]
    state = twelve["callbacks"]["GuardCallback"]
    assert (state["skipped"], state["rollbacks"], state["rate_scale"]) == (3, 1, 0.5)

    late = RunFolder(tmp_path / "late")  # after the rollback the lowered rate comes from the checkpoint
    shutil.copytree(whole.path, late.path)
    for step in (10, 12):
        late.step_checkpoint(step).unlink()
    run(config, late, late.step_checkpoint(8))
    assert rows(late) == rows(whole)


def test_repeated_bad_steps_stop_the_run(tiny, tmp_path, capsys, plant):
    plant(dict.fromkeys(range(3, 13), "output"))
    folder = RunFolder(tmp_path / "run")
    settings = ["trainer.guard.rollback_after=2", "trainer.guard.max_rollbacks=1", "trainer.guard.lr_factor=0.25"]
    with pytest.raises(RunDiverged, match=r"stopped at step 6: 2 bad steps in a row after 1 rollbacks.*layer 5"):
        run(compose_config([*tiny, *DEEP, *settings]), folder, None)
    said = [line for line in capsys.readouterr().out.splitlines() if "skipped: " in line]
    assert [f"step {step} " in line and "layer 5" in line for step, line in zip(range(3, 7), said, strict=True)] == [
        True
    ] * 4
    assert not folder.summary.exists()


def test_without_a_checkpoint_the_weights_are_kept(tiny, tmp_path, capsys, plant):
    plant({1: "output", 2: "output", 3: "output"})
    run(
        compose_config([*tiny, *DEEP, "trainer.ckpt_every=20", "trainer.max_steps=5"]),
        RunFolder(tmp_path / "run"),
        None,
    )
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "rollback" in line)
    assert "steps 1 to 3" in line
    assert "no checkpoint yet" in line


def test_a_loss_spike_is_skipped_if_asked_for(tiny, tmp_path, capsys, monkeypatch):
    training_step = LitLM.training_step

    def step(self, batch, batch_idx):
        output = training_step(self, batch, batch_idx)
        return output | {"loss": output["loss"] * (10 if self.trainer.global_step + 1 in (8, 9) else 1)}

    monkeypatch.setattr(LitLM, "training_step", step)
    base = [*tiny, *DEEP, "trainer.accumulate=2"]
    run(compose_config(base), RunFolder(tmp_path / "off"), None)
    assert "skipped:" not in capsys.readouterr().out
    whole, broken = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "broken")
    config = compose_config(
        [*base, "trainer.guard.spike_sigma=6", "trainer.guard.spike_window=5", "trainer.keep_last=9"]
    )
    run(config, whole, None)
    said = [line for line in capsys.readouterr().out.splitlines() if "skipped:" in line]
    losses = [float(row["train/loss"]) for row in rows(whole)]
    mean = sum(losses[2:7]) / 5
    assert float(re.search(r"step 8 skipped: \D+([\d.]+)", said[0])[1]) == pytest.approx(10 * losses[7], rel=1e-3)
    assert float(re.search(r"average ([\d.]+)", said[0])[1]) == pytest.approx(mean, rel=1e-3)
    assert "step 9 skipped" in said[1]
    assert len(said) == 2
    shutil.copytree(whole.path, broken.path)
    for number in (8, 10, 12):
        broken.step_checkpoint(number).unlink()
    run(config, broken, broken.step_checkpoint(6))
    assert rows(broken) == rows(whole)


RANKS = """
import math, sys
import torch
from hybridlm.layers.mamba2 import Mamba2
from hybridlm.train.lightning_module import LitLM

training_step, forward, now = LitLM.training_step, Mamba2.forward, {}

def step(self, batch, batch_idx):
    now["layer"] = (self.model.blocks[5].mixer
        if self.trainer.global_rank == 1 and self.trainer.global_step + 1 in (4, 5, 6) else None
    )
    return training_step(self, batch, batch_idx)

def spoiled(self, *args, **kwargs):
    y = forward(self, *args, **kwargs)
    return y * torch.tensor(math.nan) if self is now.get("layer") else y

LitLM.training_step, Mamba2.forward = step, spoiled
from hybridlm.cli.start import main
main()
"""


@pytest.fixture
def scaled(tmp_path):
    """A guard under a loss scaler, on a CPU: ``step(loss)`` with a gradient of 1e15 times the loss, in fp32."""
    config = compose_config([])
    model = fresh_model(config.model, 64, seed=0, device="cpu")
    optimizer = HybridOptimizer(model_groups(model, config.optim), config.optim)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**80, growth_interval=10**6)
    precision = SimpleNamespace(scaler=scaler, train_step_context=contextlib.nullcontext)
    strategy = SimpleNamespace(reduce=lambda value, reduce_op: value, broadcast=lambda value: value)
    trainer = SimpleNamespace(
        global_step=0, is_global_zero=True, optimizers=[optimizer], precision_plugin=precision, strategy=strategy
    )
    said = []
    guard = guards.GuardCallback(GuardConfig(), RunFolder(tmp_path), ckpt_every=1, say=said.append)
    module = SimpleNamespace(model=model)
    guard.on_train_start(trainer, module)
    batch = {"ids": torch.zeros(1, 2, dtype=torch.int64), "targets": torch.zeros(1, 2, dtype=torch.int64)}

    def step(loss: float) -> list[str]:
        optimizer.zero_grad()
        guard.on_train_batch_start(trainer, module, batch, 0)
        big = scaler.scale((model.norm.weight * 1e15).sum() * loss)
        guard.on_before_backward(trainer, module, scaler.scale(torch.tensor(loss)))
        big.backward()
        scaler.step(optimizer)
        scaler.update()
        trainer.global_step += 1
        guard.on_train_batch_end(trainer, module, None, batch, 0)
        return [said.pop() for _ in list(said)]

    return SimpleNamespace(step=step, optimizer=optimizer, scaler=scaler)


def test_a_loss_scale_that_is_too_large_is_no_bad_step_but_nan_is(scaled):
    """1e15 x 2^79 is beyond float32, 1e15 x 2^78 is not."""
    for _ in range(2):
        assert scaled.step(1.0) == []
        assert scaled.optimizer.refused is None
    assert scaled.step(1.0) == []
    assert (scaled.optimizer.refused, scaled.optimizer.skipped) == (False, 0)
    (line,) = scaled.step(math.nan)
    assert "the gradient of norm.weight is not finite; 1 in a row, 1 in all" in line


def test_the_end_is_one_line_and_exit_code_1(capsys):
    with pytest.raises(SystemExit) as end, reported():
        raise RunDiverged("stopped at step 6")
    assert end.value.code == 1
    assert capsys.readouterr().err == "error: stopped at step 6\n"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_nan_on_one_rank_skips_and_rolls_back_on_all(tiny, tmp_path, environment, strategy):
    program = tmp_path / "train.py"
    program.write_text(RANKS)
    arguments = [
        *tiny,
        *DEEP,
        "optim=adamw",
        "trainer.max_steps=8",
        "trainer.devices=2",
        f"trainer.strategy={strategy}",
    ]
    folder = RunFolder(tmp_path / "run")
    line = [sys.executable, str(program), *arguments, f"hydra.run.dir={folder.path}"]
    environment = {**environment, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said = [text for text in done.stdout.splitlines() if text.startswith("warning     step")]
    assert [text.split(";")[0] for text in said[:3]] == [
        f"warning     step {step} skipped: the output of layer 5 (blocks.5.mixer) is not finite" for step in (4, 5, 6)
    ]
    assert "steps 4 to 6" in said[3]
    assert "moments of step 2" in said[3]
    assert len(said) == 4
    logged = rows(folder)
    assert [float(row["optim/skipped_steps"]) for row in logged] == [0, 0, 0, 1, 2, 3, 3, 3]
    assert all(math.isfinite(float(row["train/loss"])) for row in logged if int(row["step"]) not in (4, 5, 6))
    content = read_checkpoint(folder.newest_checkpoint())
    assert all(bool(tensor.isfinite().all()) for tensor in content["state_dict"].values())
