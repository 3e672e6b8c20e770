"""Where models go: every preset's line, and `model/style=portable`."""

from __future__ import annotations

import pytest

from hybridlm.cli.compose import compose_config
from hybridlm.config.groups import groups
from hybridlm.interop.architectures import ARCHITECTURES
from hybridlm.interop.gguf.architectures import TARGETS
from hybridlm.interop.reach import destinations, nearest

HYBRIDS = ("hybrid_alternating", "hybrid_early_t_late_m", "hybrid_small", "hybrid_strategic", "hybrid_gdn")
ELSEWHERE = {
    "transformer": "Llama",
    "mamba": "Mamba",
    "mla_moe": "DeepseekV3",
    "kimi": "KimiLinear",
    "nano_start": "Llama",
}


@pytest.mark.parametrize("preset", HYBRIDS)
@pytest.mark.parametrize("size", ["default", "tiny", "small", "d12", "d26"])
def test_a_portable_hybrid_has_an_architecture_at_every_size(preset, size):
    model = compose_config([f"model={preset}", "model/style=portable", f"size={size}"]).model
    architecture, needs = nearest(model, ARCHITECTURES)
    assert not needs
    assert architecture.name == ("Qwen3_5ForCausalLM" if preset == "hybrid_gdn" else "GraniteMoeHybridForCausalLM")
    assert model.mlp.resolve(model, "").d_ff % 256 == 0
    rotary = {layer.params.rope for layer in model.layers if layer.kind == "attention"}
    assert rotary == {preset == "hybrid_gdn"}
    assert destinations(model).startswith("to transformers ")
    assert ("llama.cpp" in destinations(model)) == (preset != "hybrid_gdn")


@pytest.mark.parametrize(("preset", "name"), ELSEWHERE.items())
def test_other_portable_presets_have_one_too(preset, name):
    model = compose_config([f"model={preset}", "model/style=portable"]).model
    architecture, needs = nearest(model, ARCHITECTURES)
    assert (architecture.name, needs) == (f"{name}ForCausalLM", [])
    assert all(layer.params.rope for layer in model.layers if layer.kind == "attention")
    assert bool(nearest(model, TARGETS)[1]) == (name == "KimiLinear")


@pytest.mark.parametrize("preset", groups()["model"])
def test_the_line_of_a_preset_is_true(preset):
    model = compose_config([f"model={preset}"]).model
    line = destinations(model, advised=True)
    if "; to " in line:  # with these overrides it goes there
        overrides = line.partition(" with ")[2].replace("'", "").split(" model.")
        overrides = [one if one.startswith("model.") else f"model.{one}" for one in overrides]
        assert not nearest(compose_config([f"model={preset}", *overrides]).model, ARCHITECTURES)[1]
    elif "only" in line:
        assert any(not need.overrides for need in nearest(model, ARCHITECTURES)[1])
    else:
        assert not nearest(model, ARCHITECTURES)[1]


@pytest.mark.parametrize("preset", ["transformer", "hybrid_alternating", "mamba3", "mla_moe"])
def test_most_presets_are_in_nanochats_style_already(preset):
    plain, styled = (compose_config([f"model={preset}", *style]).model for style in ([], ["model/style=nanochat"]))
    assert (plain.layers, plain.logit_softcap) == (styled.layers, styled.logit_softcap)


def test_a_style_of_a_subfolder_is_a_group_of_its_own():
    found = groups()
    assert found["model/style"] == ["nanochat", "portable", "preset"]
    assert not any("style" in option for option in found["model"])
    assert "patterns/text" in found["experiments"]


def test_llama_cpp_takes_what_transformers_does_not():
    rotary = ["model.attention.rope=true", "model.attention.rope_fraction=0.25"]
    model = compose_config(["model=hybrid_small", *rotary]).model
    assert destinations(model, advised=True).startswith("as remote code, to llama.cpp; to transformers ")
