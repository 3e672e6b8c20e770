"""Every YAML under conf/ and experiments/ composes and validates alone."""

from __future__ import annotations

from itertools import product

import pytest

from hybridlm.cli.compose import compose_config
from hybridlm.config.groups import groups

CHOICES = [(group, option) for group, options in groups().items() for option in options]
NEEDS = {  # the user's own files have no default
    ("data", "files"): ["data.path=*.txt"],
    ("data", "chat"): ["data.path=*.jsonl"],
    ("data", "preferences"): ["data.path=*.jsonl"],
    ("optim", "dpo"): ["data=preferences", "data.path=*.jsonl"],
    ("data", "hf"): ["data.hf.id=owner/name"],
    ("data", "mixture"): ["data.parts={a: {source: stdlib}, b: {source: files, path: b.txt, weight: 2.0}}"],
    ("data", "bins"): ["data.path=train.bin", "data.tokenizer.path=tokenizer.json"],
}
PRESETS = (
    "hybrid_alternating",
    "hybrid_early_t_late_m",
    "hybrid_strategic",
    "transformer",
    "mamba",
    "mamba2",
    "mamba3",
    "mamba3_mimo",
    "mla_moe",
)


def arguments(group, option):
    takes_sizes = ["model=transformer"] if group == "size" else []
    return [*takes_sizes, f"{group}={option}", *NEEDS.get((group, option), [])]


@pytest.mark.parametrize(("group", "option"), CHOICES, ids=lambda value: value)
def test_validates_alone(group, option):
    config = compose_config(arguments(group, option))
    if group == "model":
        assert config.model.name == option
    if group in ("size", "hardware", "logger", "optim"):
        assert getattr(config, group).name == {"sft": "adamw", "dpo": "adamw"}.get(option, option)


@pytest.mark.parametrize(("preset", "size"), list(product(PRESETS, ["tiny", "small", "d12", "d16", "d20", "d26"])))
def test_presets_take_every_size(preset, size):
    config = compose_config([f"model={preset}", f"size={size}"])
    model, layers = config.model, config.model.layers
    assert model.sizes == ("default", "tiny", "small", "d12", "d16", "d20", "d26")
    if size.startswith("d"):
        assert (len(layers), model.d_model) == (int(size[1:]), 64 * int(size[1:]))
        assert all(layer.params.head_dim == 128 for layer in layers if layer.kind == "attention")
        assert config.data.tokenizer.vocab_size == 65_536


def test_tiny_keeps_both_kinds_of_layer():
    for preset in ("hybrid_small", "hybrid_alternating"):
        assert {"attention", "mamba2"} <= compose_config([f"model={preset}", "size=tiny"]).model.kinds
