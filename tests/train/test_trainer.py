"""bf16-true: what is rounded and what is not, that it trains, and that it resumes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from hybridlm.cli.compose import compose_config
from hybridlm.generate.engine import Engine
from hybridlm.generate.sampling import Sampling
from hybridlm.model.build import fresh_model
from hybridlm.runs.checkpoint import load_run, read_checkpoint
from hybridlm.runs.run_folder import RunFolder
from hybridlm.train.run import run
from hybridlm.train.trainer import BFloat16

# Every kind of layer, a sigmoid router among them.
ALL = [
    "model.pattern=M1 M:moe M3 T L",
    "model.mamba3.head_dim=16",
    "model.mamba3.d_state=8",
    "model.mamba3.chunk=16",
    "model.mamba1.chunk=16",
]
ALL += ["model.moe.n_experts=3", "model.moe.d_expert=24", "model.moe.router=sigmoid", "model.moe.bias_update_rate=0.01"]
EVERY = ["trainer.log_every=1", "trainer.val_every=null"]


def rows(folder: RunFolder) -> list[dict]:
    return [json.loads(line) for line in folder.metrics_jsonl.read_text().splitlines()]


def test_only_what_may_be_rounded_is(tiny):
    config = compose_config([*tiny, *ALL])
    model = fresh_model(config.model, 257, seed=0, device="cpu")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    BFloat16().convert_module(torch.nn.ModuleDict({"model": model}))
    specs, parameters = model.param_specs(), dict(model.named_parameters())
    for name, tensor in model.state_dict().items():
        rounded = name in parameters and specs[name].dtype == "model"
        assert tensor.dtype == (torch.bfloat16 if rounded else before[name].dtype), name
        assert torch.equal(tensor, before[name].to(tensor.dtype))
    islands = {name.rpartition(".")[2] for name, spec in specs.items() if spec.dtype == "fp32"}
    assert {"A_log", "D", "dt_bias"} <= islands
    assert "blocks.1.ffn.gate.weight" in {name for name, tensor in parameters.items() if tensor.dtype == torch.float32}


def test_torchs_default_dtype_stays():
    with BFloat16().train_step_context():
        assert torch.zeros(1).dtype == torch.float32


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_it_learns_as_fp32_does(tiny, tmp_path, optim):
    """Within 2 % after 30 steps, in the mean of the last five, since single losses are noisy."""
    losses = {}
    for precision in ("32-true", "bf16-true"):
        folder = RunFolder(tmp_path / precision)
        settings = [
            *tiny,
            *EVERY,
            f"optim={optim}",
            "trainer.max_steps=30",
            "trainer.ckpt_every=30",
            f"trainer.precision={precision}",
        ]
        run(compose_config(settings), folder, None)
        losses[precision] = sum(row["train/loss"] for row in rows(folder)[-5:]) / 5
    assert losses["bf16-true"] == pytest.approx(losses["32-true"], rel=0.02)
    assert losses["bf16-true"] < 4.5


def test_every_layer_trains_resumes_to_the_bit_and_generates(tiny, tmp_path):
    config = compose_config(
        [*tiny, *ALL, *EVERY, "trainer.precision=bf16-true", "trainer.accumulate=2", "trainer.max_steps=8"]
    )
    whole, broken = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "broken")
    run(config, whole, None)
    content = read_checkpoint(whole.step_checkpoint(8))
    kinds = {name: tensor.dtype for name, tensor in content["state_dict"].items()}
    assert kinds["model.blocks.1.mixer.A_log"] == torch.float32
    assert kinds["model.blocks.1.mixer.in_proj.weight"] == torch.bfloat16
    states = content["optimizer_states"][0]["state"].values()
    assert {value.dtype for state in states for value in state.values()} == {torch.float32}

    shutil.copytree(whole.path, broken.path)
    broken.step_checkpoint(8).unlink()
    run(config, broken, broken.step_checkpoint(4))
    assert [row["train/loss"] for row in rows(broken)] == [row["train/loss"] for row in rows(whole)]
    again = read_checkpoint(broken.step_checkpoint(8))
    for name, tensor in content["state_dict"].items():
        assert again["state_dict"][name].dtype == tensor.dtype
        assert torch.equal(again["state_dict"][name], tensor)
    for mine, its in zip(again["optimizer_states"][0]["state"].values(), states, strict=True):
        assert all(torch.equal(mine[key], value) for key, value in its.items())

    loaded = load_run(str(whole.path), torch.device("cpu"))
    assert loaded.model.embedding.weight.dtype == torch.bfloat16
    (written,) = Engine(loaded.model, None).generate([[1, 2, 3]], Sampling(temperature=0, max_new_tokens=5))
    assert len(written.ids) == 5
