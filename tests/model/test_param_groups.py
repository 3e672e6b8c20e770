"""Which parameters decay: what the layers declare arrives in the optimizer's groups, each parameter once."""

from __future__ import annotations

import pytest
import torch
from small_models import VOCAB, small_config

from hybridlm.config.mixers.attention import AttentionConfig
from hybridlm.config.optim import OptimConfig
from hybridlm.model.build import build_model
from hybridlm.optim.optimizer import param_groups

CONFIG = small_config("M:mlp T", tie_embeddings=False, attention=AttentionConfig(n_heads=2, qk_norm=True))
DECAYING = {
    "blocks.0.mixer.in_proj.weight",
    "blocks.0.mixer.out_proj.weight",
    "blocks.0.ffn.gate_proj.weight",
    "blocks.0.ffn.up_proj.weight",
    "blocks.0.ffn.down_proj.weight",
    "blocks.1.mixer.q_proj.weight",
    "blocks.1.mixer.k_proj.weight",
    "blocks.1.mixer.v_proj.weight",
    "blocks.1.mixer.o_proj.weight",
    "blocks.1.ffn.gate_proj.weight",
    "blocks.1.ffn.up_proj.weight",
    "blocks.1.ffn.down_proj.weight",
    "lm_head.weight",
}
FIXED = {
    "embedding.weight",
    "norm.weight",
    "blocks.0.mixer_norm.weight",
    "blocks.0.mixer.conv1d.weight",
    "blocks.0.mixer.conv1d.bias",
    "blocks.0.mixer.dt_bias",
    "blocks.0.mixer.A_log",
    "blocks.0.mixer.D",
    "blocks.0.mixer.norm.weight",
    "blocks.0.ffn_norm.weight",
    "blocks.1.mixer_norm.weight",
    "blocks.1.mixer.q_norm.weight",
    "blocks.1.mixer.k_norm.weight",
    "blocks.1.ffn_norm.weight",
}


def groups_by_name(config, optim):
    model = build_model(config, VOCAB)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = param_groups(model.named_parameters(), model.param_specs(), optim)
    return model, [(group, [names[id(parameter)] for parameter in group["params"]]) for group in groups]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_each_parameter_is_in_one_group_and_decays_as_declared(name):
    model, groups = groups_by_name(CONFIG, OptimConfig(name=name, weight_decay=0.3))
    members = [member for _, names in groups for member in names]
    assert sorted(members) == sorted(name for name, _ in model.named_parameters())
    assert {member for group, names in groups for member in names if group["weight_decay"] == 0.3} == DECAYING
    assert {member for group, names in groups for member in names if group["weight_decay"] == 0.0} == FIXED


def test_muon_takes_the_matrices_inside_the_blocks_only():
    _, groups = groups_by_name(CONFIG, OptimConfig(name="muon"))
    muon = {member for group, names in groups for member in names if group["algorithm"] == "muon"}
    assert muon == {name for name in DECAYING if name.startswith("blocks.")}
    (group,) = [group for group, _ in groups if group["algorithm"] == "muon"]
    sizes = {
        tuple(parameter.shape): blocks for parameter, blocks in zip(group["params"], group["row_blocks"], strict=True)
    }
    assert sizes[48, 8] == (16, 16, 6, 6, 4), "z, x, B, C and dt are orthogonalised apart"


def test_a_tied_head_is_an_embedding():
    _, groups = groups_by_name(small_config("M"), OptimConfig(weight_decay=0.3))
    (embedding,) = [group for group, names in groups if "embedding.weight" in names]
    assert (embedding["weight_decay"], embedding["algorithm"]) == (0.0, "adamw")
    assert not any("lm_head.weight" in names for _, names in groups)


def test_roles_are_learning_rates():
    model = build_model(CONFIG, VOCAB)
    specs = model.param_specs()
    assert specs["embedding.weight"].role == "embedding"
    assert specs["lm_head.weight"].role == "head"
    assert {specs[name].role for name in DECAYING - {"lm_head.weight"}} == {"matrix"}
    assert {specs[name].role for name in FIXED - {"embedding.weight"}} == {"vector"}


def test_an_undeclared_parameter_is_found():
    model = build_model(CONFIG, VOCAB)
    model.blocks[0].extra = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(RuntimeError, match=r"blocks\.0\.extra"):
        model.param_specs()
