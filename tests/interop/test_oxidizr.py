"""Model files of oxidizr: what they become, and what is refused."""

from __future__ import annotations

import pytest
import yaml

from hybridlm.cli.compose import compose_config
from hybridlm.config.load import validate_model
from hybridlm.errors import UserError
from hybridlm.interop.oxidizr import read_oxidizr

NANO = {
    "name": "nano",
    "hidden_size": 384,
    "num_layers": 8,
    "num_heads": 6,
    "kv_heads": None,
    "kv_latent_dim": 192,
    "q_latent_dim": 192,
    "d_rope": 16,
    "num_experts": 4,
    "experts_per_tok": 2,
    "shared_expert_enabled": True,
    "intermediate_size": 1536,
    "mamba_layers": [0, 1, 2, 4, 5, 6],
    "mamba2_num_heads": 48,
    "mamba2_head_dim": 16,
    "mamba2_state_size": 64,
    "mamba2_chunk_size": 64,
    "mamba2_n_groups": 1,
    "mamba2_conv_kernel": 4,
    "mamba2_expand": 2,
    "vocab_size": 128354,
    "max_seq_len": 512,
    "rope_theta": 10000.0,
}
TRAINER = {"learning_rate": 3e-4, "max_steps": 0, "num_epochs": 2, "batch_size": 4, "gradient_accumulation": 2}
PRESETS = {
    "nano": {},
    "nano_mamba3_hybrid": {"mamba3_enabled": True, "mamba3_complex_rope": True, "mamba3_use_conv": True},
}


def read(tmp_path, model, trainer=None):
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump({"model": model, "trainer": trainer or {}}))
    return read_oxidizr(path)


@pytest.mark.parametrize("preset", PRESETS)
def test_it_becomes_the_preset_of_that_name(preset, tmp_path):
    found = read(tmp_path, NANO | PRESETS[preset], TRAINER)
    tree = yaml.safe_load(found.text)
    assert validate_model(tree["model"]).layers == compose_config([f"model={preset}"]).model.layers
    assert tree["data"] == {"seq_len": 512, "tokenizer": {"vocab_size": 128354}, "batch_size": 4, "global_batch": 8}
    assert tree["optim"] == {"lr": 3e-4}
    assert [line.split(" ")[0] for line in found.left_out] == ["trainer.num_epochs"]


def test_attention_without_a_latent_and_a_dense_ffn(tmp_path):
    plain = {
        key: NANO[key] for key in ("hidden_size", "num_layers", "num_heads", "vocab_size", "max_seq_len", "rope_theta")
    }
    model = validate_model(yaml.safe_load(read(tmp_path, plain | {"kv_heads": 2}).text)["model"])
    assert {(layer.kind, layer.ffn_kind) for layer in model.layers} == {("attention", "mlp")}
    assert model.layers[0].params.n_kv_heads == 2
    assert model.layers[0].ffn.d_ff == 4 * 384


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": None},
        {"hidden_size": "wide"},
        {"num_layers": -1},
        {"num_layers": 10**9},
        {"mamba_layers": [99]},
        {"mamba_layers": {"a": 1}},
        {"mamba2_num_heads": 7},
        {"dtype": "f8"},
        {"vocab_size": [1]},
    ],
    ids=str,
)
def test_what_is_no_model_is_refused_in_a_line(change, tmp_path):
    with pytest.raises(UserError) as refused:
        read(tmp_path, {key: value for key, value in (NANO | change).items() if value is not None})
    assert len(refused.value.problems) == 1
