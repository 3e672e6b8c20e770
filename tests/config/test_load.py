"""Validation: every mistake in one line with the place and what is legal, all of them together; and the YAML round
trip."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridlm.config.constraints import unused_section_warnings
from hybridlm.config.ffns.mlp import MLPSpec
from hybridlm.config.load import from_yaml, load_config, to_yaml, validate_model
from hybridlm.config.mixers.attention import AttentionSpec
from hybridlm.config.mixers.mamba2 import Mamba2Spec
from hybridlm.errors import UserError


def tree(**sections):
    """A valid tree with these changes: ``model={...}``."""
    return {**sections, "model": {"pattern": "TM", **sections.get("model", {})}}


def problems(**sections):
    with pytest.raises(UserError) as caught:
        load_config(tree(**sections))
    return caught.value.problems


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"model": {"patern": "TM"}}, "model.patern = 'TM': unknown key; did you mean model.pattern?"),
        ({"model": {"d_model": "abc"}}, "model.d_model = 'abc': expected an integer >= 1"),
        ({"model": {"d_model": 12.5}}, "model.d_model = 12.5: expected an integer >= 1"),
        ({"model": {"d_model": True}}, "model.d_model = true: expected an integer >= 1"),
        ({"model": {"d_model": 0}}, "model.d_model = 0: expected an integer >= 1"),
        ({"model": {"attention": None}}, "model.attention = null: expected a section of fields"),
        ({"model": {"tie_embeddings": "yes"}}, "model.tie_embeddings = 'yes': expected true or false"),
        ({"model": {"mamba2": {"dt_range": [1]}}}, "model.mamba2.dt_range = [1]: expected a list of 2 numbers"),
        ({"model": {"pattern": 5}}, "model.pattern = 5: expected text, a list of texts or null"),
        ({"model": {"mlp": {"d_model": 3}}}, "model.mlp.d_model = 3: unknown key; did you mean model.d_model?"),
        ({"optim": {"schedule": "cos"}}, "optim.schedule = 'cos': not one of cosine, linear, constant, wsd"),
        ({"optim": {"lr": math.nan}}, "optim.lr = nan: expected a number > 0"),
        ({"optim": {"warmup": "x"}}, "optim.warmup = 'x': expected an integer >= 0 or a number >= 0"),
        ({"data": {"global_batch": "x"}}, "data.global_batch = 'x': expected an integer >= 1 or 'auto'"),
        ({"data": {"batch_size": 0}}, "data.batch_size = 0: expected an integer >= 1 or 'auto'"),
        ({"data": {"path": 3}}, "data.path = 3: expected text of length >= 1, a list of texts of length >= 1 or null"),
        ({"data": {"seq_len": "???"}}, "data.seq_len = ???: a value is required"),
        ({"trainer": {"headless": 3}}, "trainer.headless = 3: expected true or false or 'auto'"),
        ({"trainer": {"val_every": 0}}, "trainer.val_every = 0: expected an integer >= 1 or null"),
        ({"callbacks": {"samples": {"prompts": [1]}}}, "callbacks.samples.prompts = [1]: expected a list of texts"),
        ({"modle": {"d_model": 3}}, "modle: unknown key; did you mean model?"),
        ({"d_model": 64}, "d_model = 64: unknown key; did you mean model.d_model?"),
        ({"optim": 3}, "optim = 3: expected a section of fields"),
    ],
)
def test_a_wrong_field_is_one_line(sections, line):
    assert problems(**sections) == [line]


def test_all_wrong_fields_are_reported_together():
    found = problems(
        model={"patern": 1, "d_model": "x"}, optim={"lr": -1, "schedule": "cos"}, data={"batch_size": "all"}, sed=3
    )
    assert len(found) == 6


def test_numeric_keys_are_unknown_keys():
    with pytest.raises(UserError, match="3 = 4: unknown key"):
        load_config({"model": {"pattern": "T"}, 3: 4})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        (
            {"model": {"mamba2": {"head_dim": 37}}},
            ["model.mamba2.head_dim = 37", "2 x 256 = 512", "not a multiple of 37", "32 and 64"],
        ),
        ({"model": {"mamba2": {"n_heads": 3}}}, ["model.mamba2.n_heads = 3", "192", "512"]),
        ({"model": {"mamba2": {"n_groups": 3}}}, ["model.mamba2.n_groups = 3", "2 and 4"]),
        ({"model": {"mamba2": {"expand": 1.7}}}, ["model.mamba2.expand = 1.7", "whole number"]),
        ({"model": {"mamba2": {"dt_range": [0.1, 0.01]}}}, ["dt_range", "low <= high"]),
        ({"model": {"mamba2": {"dt_limit": [-1, 1]}}}, ["dt_limit", "0 <= low"]),
        ({"model": {"mamba2": {"a_range": [0, 1]}}}, ["a_range", "0 < low"]),
        ({"model": {"attention": {"n_heads": 3}}}, ["model.attention.n_heads = 3", "256", "2 and 4"]),
        ({"model": {"attention": {"n_kv_heads": 3}}}, ["model.attention.n_kv_heads = 3", "2 and 4"]),
        ({"model": {"attention": {"head_dim": 33, "rope": True}}}, ["head_dim = 33", "even"]),
        ({"model": {"variants": {"T": {"mixer": "attention"}}}}, ["model.variants.T", "capital letter"]),
        ({"model": {"variants": {"S": {"mixer": "foo"}}}}, ["model.variants.S.mixer = 'foo'", "attention, mamba1"]),
        (
            {"model": {"variants": {"S": {"mixer": "attention", "windw": 2}}}},
            ["model.variants.S.windw", "model.variants.S.window?"],
        ),
        (
            {"model": {"pattern": "S", "variants": {"S": {"mixer": "attention", "n_heads": 3}}}},
            ["model.variants.S.n_heads = 3"],
        ),
        ({"size": {"name": "d13"}}, ["size = 'd13'", "tiny"]),
        ({"data": {"source": "files"}}, ["data.path = null", "data.source=files"]),
        ({"data": {"source": "bins", "path": "x.bin"}}, ["data.tokenizer.kind = 'bpe'", "data.tokenizer.path"]),
        (
            {"data": {"source": "bins", "tokenizer": {"kind": "file", "path": "x.json"}}},
            ["data.path = null", "a token file"],
        ),
        ({"data": {"source": "bins", "path": "x.bin", "tokenizer": {"kind": "file"}}}, ["data.tokenizer.path = null"]),
        ({"data": {"dtype": "u16"}}, ["data.dtype = 'u16'", "data.source=bins"]),
        ({"data": {"val_path": "x.bin"}}, ["data.val_path = 'x.bin'", "data.source=files and bins"]),
        ({"data": {"val_fraction": 0.0}}, ["data.val_fraction = 0", "data.val_path"]),
        ({"data": {"source": "files", "path": ["a", ""]}}, ["data.path = ['a', '']", "texts of length >= 1"]),
        ({"data": {"tokenizer": {"path": "x.json"}}}, ["data.tokenizer.path = 'x.json'", "data.tokenizer.kind=file"]),
        ({"data": {"path": "*.txt"}}, ["data.path = '*.txt'", "data=files"]),
        (
            {"data": {"global_batch": 16, "batch_size": 3}},
            ["data.global_batch = 16", "not a multiple", "data.batch_size (3)"],
        ),
        (
            {"data": {"global_batch": 16, "batch_size": 4}, "trainer": {"accumulate": 2, "devices": 1}},
            ["data.global_batch = 16: is not data.batch_size (4) x trainer.accumulate (2) x trainer.devices (1) = 8"],
        ),
        ({"optim": {"warmup": 100}, "trainer": {"max_steps": 100}}, ["optim.warmup = 100", "trainer.max_steps = 100"]),
        ({"optim": {"warmup": 1.5}}, ["optim.warmup = 1.5", "below 1"]),
        ({"optim": {"betas": [0.9, 1]}}, ["optim.betas"]),
        (
            {"trainer": {"precision": "16-mixed"}, "hardware": {"accelerator": "cpu"}},
            ["trainer.precision = '16-mixed'", "CUDA"],
        ),
    ],
)
def test_a_broken_rule_between_fields_is_one_line(sections, parts):
    found = problems(**sections)
    assert len(found) == 1
    assert [part for part in parts if part not in found[0]] == []


def test_sections_that_no_layer_uses_are_not_checked():
    config = load_config(tree(model={"pattern": "T", "mamba2": {"head_dim": 37}}))
    assert unused_section_warnings(
        config, ["++model.mamba2.head_dim=37", "++model.mamba2.expand=2", "++optim.lr=1e-3"]
    ) == ["model.mamba2.head_dim has no effect: no layer is mamba2"]
    assert unused_section_warnings(config, ["model.attention.n_heads=4", "model=transformer"]) == []


def test_derived_numbers():
    model = load_config(tree(model={"pattern": "TMS", "variants": {"S": {"mixer": "attention", "window": 8}}})).model
    attention, mamba, local = model.layers
    assert isinstance(attention.params, AttentionSpec)
    assert (attention.params.head_dim, attention.params.n_kv_heads, attention.params.scale) == (64, 4, 64**-0.5)
    assert attention.ffn == MLPSpec(256, 704, "swiglu")  # 8/3 x 256 = 682.7, rounded up to a multiple of 32
    assert isinstance(mamba.params, Mamba2Spec)
    assert (mamba.params.n_heads, mamba.params.d_inner, mamba.ffn, mamba.ffn_kind) == (8, 512, None, "none")
    assert isinstance(local.params, AttentionSpec)
    assert local.params.window == 8
    wide = load_config(tree(model={"pattern": "T", "d_model": 384})).model
    assert wide.layers[0].ffn == MLPSpec(384, 1024, "swiglu")


def test_a_cut_cycle_is_noted():
    assert "cut" in str(load_config(tree(model={"n_layers": 3})).model.layer_note)
    assert load_config(tree(model={"n_layers": 4})).model.layer_note is None


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"model": {"pattern": ["T", "M"], "variants": {"S": {"mixer": "attention", "window": 4}}}},
        {
            "model": {"norm_eps": 1e-5, "mamba2": {"dt_limit": [0.0, math.inf]}},
            "optim": {"warmup": 5, "lr": 1e-30},
            "seed": 2**32 - 1,
        },
        {"data": {"source": "files", "path": "tëxt: 'a' # b\n*.txt"}},
    ],
)
def test_yaml_round_trip(sections):
    config = load_config(tree(**sections))
    assert from_yaml(to_yaml(config)) == config
    assert validate_model(config.model.model_dump()) == config.model


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3",
        "a: [",
        "model: {pattern: Q}",
        "a: &a [*a]",
        "seed: !!python/name:os.system",
        "- " * 100_000,
        "9" * 5_000,
    ],
)
def test_text_that_is_no_configuration(text):
    with pytest.raises(UserError):
        from_yaml(text)


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)
paths = st.sampled_from(
    [
        ("model",),
        ("model", "pattern"),
        ("model", "variants"),
        ("model", "mamba2"),
        ("optim", "betas"),
        ("data", "tokenizer"),
        ("size", "name"),
        ("x",),
    ]
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(paths, values), max_size=3))
def test_any_tree_loads_or_raises_config_errors_of_one_line(changes):
    root: dict[str, object] = {"model": {"pattern": "TM"}}
    for path, value in changes:
        place = root
        for name in path[:-1]:
            inner = place.setdefault(name, {})
            place = inner if isinstance(inner, dict) else {}
        place[path[-1]] = value
    try:
        config = load_config(root)
    except UserError as error:
        lines = error.problems
    else:
        lines = [to_yaml(config)] if from_yaml(to_yaml(config)) != config else ["fine"]
    assert lines
    assert not any("\n" in line or "pydantic" in line for line in lines)


@pytest.mark.parametrize("high", [math.inf, ".inf"])
def test_infinity_may_be_written_as_yaml_does(high):
    """On a command line .inf arrives as text."""
    assert load_config({"model": {"pattern": "M", "mamba2": {"dt_limit": [0.0, high]}}}).model.mamba2.dt_limit == (
        0.0,
        math.inf,
    )
