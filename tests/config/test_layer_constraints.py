"""Dimensions that no layer can have: each in one line that names the field, its value and what is legal, all of them
together."""

from __future__ import annotations

import pytest

from hybridlm.config.load import load_config
from hybridlm.config.resolve import resolve_layers
from hybridlm.errors import UserError

EVERY_KIND = "T M1 M2 M3 L:moe"


def problems(pattern, **sections):
    with pytest.raises(UserError) as caught:
        load_config({"model": {"pattern": pattern, **sections}})
    return caught.value.problems


def params_of(pattern, **sections):
    return resolve_layers(load_config({"model": {"pattern": pattern, **sections}}).model)[0]


@pytest.mark.parametrize(
    ("kind", "section", "parts"),
    [
        # What one field may hold.
        ("mamba1", {"d_state": 0}, ["d_state = 0", "integer >= 1"]),
        ("mamba1", {"d_conv": 17}, ["d_conv = 17", "16"]),
        ("mamba1", {"dt_rank": 0}, ["dt_rank = 0", ">= 1"]),
        ("mamba1", {"expand": 0}, ["expand = 0", "number > 0"]),
        ("mamba1", {"chunk": 0}, ["chunk = 0", ">= 1"]),
        ("mamba1", {"chunk": 2000}, ["chunk = 2000", "1024"]),
        ("mamba1", {"n_groups": 2}, ["n_groups = 2", "unknown key"]),
        ("mamba3", {"mimo_rank": 0}, ["mimo_rank = 0", "integer >= 1"]),
        ("mamba3", {"mimo_rank": 1.5}, ["mimo_rank = 1.5", "integer >= 1"]),
        ("mamba3", {"n_groups": 0}, ["n_groups = 0", ">= 1"]),
        ("mamba3", {"a_floor": 0}, ["a_floor = 0", "number > 0"]),
        ("mamba3", {"a_activation": "relu"}, ["a_activation = 'relu'", "softplus", "heavy_tail"]),
        ("mamba3", {"rope_fraction": 1.5}, ["rope_fraction = 1.5", "1"]),
        ("mamba3", {"trapezoidal": "half"}, ["trapezoidal = 'half'", "true or false"]),
        ("mla", {"n_heads": 0}, ["n_heads = 0", ">= 1"]),
        ("mla", {"qk_nope_head_dim": 0}, ["qk_nope_head_dim = 0", ">= 1"]),
        ("mla", {"qk_rope_head_dim": -2}, ["qk_rope_head_dim = -2", ">= 0"]),
        ("mla", {"kv_lora_rank": 0}, ["kv_lora_rank = 0", ">= 1"]),
        ("mla", {"rope_theta": 1}, ["rope_theta = 1", "> 1"]),
        ("moe", {"n_experts": 0}, ["n_experts = 0", ">= 1"]),
        ("moe", {"top_k": 0}, ["top_k = 0", ">= 1"]),
        ("moe", {"n_shared_experts": -1}, ["n_shared_experts = -1", ">= 0"]),
        ("moe", {"router": "hash"}, ["router = 'hash'", "softmax", "sigmoid"]),
        ("moe", {"balance_loss_weight": -1}, ["balance_loss_weight = -1", ">= 0"]),
        # What must hold between fields. d_model is 256.
        ("mamba1", {"expand": 1.7}, ["expand = 1.7", "1.7 x 256 = 435.2", "whole number"]),
        ("mamba1", {"dt_range": [0.1, 0.01]}, ["dt_range = [0.1, 0.01]", "0 < low <= high"]),
        ("mamba3", {"dt_range": [0, 0.1]}, ["dt_range", "0 < low <= high"]),
        ("mamba3", {"expand": 1.7}, ["expand = 1.7", "whole number"]),
        ("mamba3", {"head_dim": 37}, ["head_dim = 37", "2 x 256 = 512", "not a multiple of 37", "32 and 64"]),
        ("mamba3", {"n_heads": 3}, ["n_heads = 3", "3 x 64 = 192", "512"]),
        ("mamba3", {"n_groups": 3}, ["n_groups = 3", "8 heads", "2 and 4"]),
        ("mamba3", {"n_groups": 16}, ["n_groups = 16", "8 heads", "8"]),
        ("mamba3", {"rope_fraction": 0.25}, ["rope_fraction = 0.25", "0.5 or 1.0"]),
        ("mamba3", {"d_state": 3, "rope_fraction": 0.5}, ["d_state = 3", "rope_fraction 0.5", "less than one pair"]),
        ("mamba3", {"d_state": 1, "rope_fraction": 1.0}, ["d_state = 1", "less than one pair"]),
        ("mamba3", {"d_state": 5, "mimo_rank": 2}, ["d_state = 5", "MIMO", "even"]),
        ("mla", {"qk_rope_head_dim": 15}, ["qk_rope_head_dim = 15", "pairs", "even", "rope=false"]),
        ("mla", {"qk_rope_head_dim": 0}, ["qk_rope_head_dim = 0", "at least 2", "rope=false"]),
        ("moe", {"top_k": 9}, ["top_k = 9", "n_experts = 8"]),
        ("moe", {"n_experts": 1}, ["top_k = 2", "n_experts = 1"]),
        ("moe", {"router": "sigmoid", "n_expert_groups": 3}, ["n_expert_groups = 3", "8 experts", "2 and 4"]),
        (
            "moe",
            {"router": "sigmoid", "n_expert_groups": 2, "topk_groups": 3},
            ["topk_groups = 3", "n_expert_groups = 2"],
        ),
        ("moe", {"n_expert_groups": 4}, ["n_expert_groups = 4", "router=sigmoid"]),
        (
            "moe",
            {"router": "sigmoid", "n_expert_groups": 8, "topk_groups": 8},
            ["n_expert_groups = 8", "at least 2 experts"],
        ),
        (
            "moe",
            {"router": "sigmoid", "n_expert_groups": 4, "topk_groups": 1, "top_k": 3},
            ["top_k = 3", "2 experts", "1 of 4 groups of 2"],
        ),
    ],
)
def test_an_illegal_dimension_is_one_line(kind, section, parts):
    found = problems(EVERY_KIND, **{kind: section})
    assert len(found) == 1, found
    assert found[0].startswith(f"model.{kind}.")
    assert [part for part in parts if part not in found[0]] == []
    assert "\n" not in found[0]


def test_all_of_them_are_reported_together():
    found = problems(
        EVERY_KIND,
        attention={"n_heads": 3},
        mamba1={"expand": 1.7, "dt_range": [2, 1]},
        mamba2={"n_groups": 3},
        mamba3={"n_groups": 3, "rope_fraction": 0.75, "dt_range": [0, 1]},
        mla={"qk_rope_head_dim": 3},
        moe={"router": "sigmoid", "top_k": 9, "n_expert_groups": 3},
    )
    fields = [line.partition(" = ")[0] for line in found]
    want = [
        "attention.n_heads",
        "mamba1.expand",
        "mamba1.dt_range",
        "mamba2.n_groups",
        "mamba3.n_groups",
        "mamba3.dt_range",
    ]
    want += ["mamba3.rope_fraction", "mla.qk_rope_head_dim", "moe.top_k", "moe.n_expert_groups"]
    assert sorted(fields) == sorted(f"model.{name}" for name in want)


def test_a_variant_is_named_by_its_own_path():
    (line,) = problems("X", variants={"X": {"mixer": "mamba3", "n_groups": 3}})
    assert line.startswith("model.variants.X.n_groups = 3")
    (line,) = problems("X", variants={"X": {"mixer": "mla", "qk_rope_head_dim": 3}})
    assert line.startswith("model.variants.X.qk_rope_head_dim = 3")


def test_layers_that_repeat_report_once():
    assert len(problems("(M3 L)*4", mamba3={"n_groups": 3}, mla={"qk_rope_head_dim": 3})) == 2


def test_sections_that_no_layer_uses_may_hold_anything_legal_by_itself():
    load_config(
        {"model": {"pattern": "T", "mamba3": {"n_groups": 3}, "mla": {"qk_rope_head_dim": 3}, "moe": {"top_k": 9}}}
    )


def test_what_is_legal_at_the_edge():
    """Dimensions that look odd and are not."""
    assert params_of("M3", mamba3={"d_state": 5, "rope_fraction": 1.0}).params.n_angles == 2
    assert params_of("M3", mamba3={"d_state": 3, "complex_rope": False, "mimo_rank": 2}).params.n_angles == 0
    assert params_of("M3", mamba3={"d_state": 2, "rope_fraction": 1.0, "mimo_rank": 1}).params.n_angles == 1
    assert params_of("M3", mamba3={"n_groups": 8}).params.n_groups == 8
    assert params_of("L", mla={"qk_rope_head_dim": 0, "rope": False}).params.scale == 48**-0.5
    assert params_of("L", mla={"qk_rope_head_dim": 3, "rope": False}).params.qk_rope_head_dim == 3
    assert params_of("T:moe", moe={"top_k": 8}).ffn.top_k == 8
    assert (
        params_of(
            "T:moe", moe={"router": "sigmoid", "n_expert_groups": 4, "topk_groups": 2, "top_k": 4}
        ).ffn.topk_groups
        == 2
    )


def test_derived_numbers():
    mamba1 = params_of("M1", d_model=200).params
    assert (mamba1.d_inner, mamba1.dt_rank) == (400, 13)  # 200 / 16 = 12.5, rounded up
    assert params_of("M3").params.chunk == 64
    assert params_of("M3", mamba3={"mimo_rank": 4}).params.chunk == 16
    assert params_of("M3", mamba3={"mimo_rank": 4, "chunk": 7}).params.chunk == 7
    mimo = params_of("M3", mamba3={"mimo_rank": 4, "use_conv": True, "n_groups": 2, "d_state": 6}).params
    assert (mimo.n_heads, mimo.d_inner, mimo.conv_channels, mimo.n_angles) == (8, 512, 512 + 2 * 4 * 2 * 6, 1)
    mla = params_of("L").params
    assert (mla.kv_lora_rank, mla.q_lora_rank, mla.scale) == (128, None, 64**-0.5)
    moe = params_of("T:moe", moe={"n_shared_experts": 2}).ffn
    assert (moe.d_expert, moe.d_shared) == (352, 704)  # 4/3 x 256 = 341.3, rounded up to a multiple of 32
