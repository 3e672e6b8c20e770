"""Export and import from the command line: what is written, what comes back, what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from untrained import untrained_run

from hybridlm.cli.compose import compose_config
from hybridlm.cli.verbs import run_app
from hybridlm.config.groups import groups
from hybridlm.config.load import validate_model
from hybridlm.errors import RunFailed, UserError
from hybridlm.interop import reference
from hybridlm.interop.export import choose, export_code, export_hf
from hybridlm.runs.checkpoint import load_run

pytest.importorskip("transformers", reason="transformers is not installed")
HYBRID = {
    "d_model": 32,
    "pattern": "M2:mlp T",
    "attention": {"n_heads": 2},
    "mamba2": {"head_dim": 16, "d_state": 8},
    "vocab_multiple": 64,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return untrained_run(tmp_path_factory.mktemp("run"), HYBRID)


def command(*arguments, code=0):
    with pytest.raises(SystemExit) as end:
        run_app([str(argument) for argument in arguments])
    assert (end.value.code or 0) == code


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "granite"
    command("export", run, folder)
    return folder


def test_what_is_exported_is_checked_and_comes_back(run, exported, tmp_path, capsys):
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["GraniteMoeHybridForCausalLM"]
    assert config["layer_types"] == ["mamba", "attention"]
    assert (
        config["vocab_size"] == load_file(exported / "model.safetensors")["model.embed_tokens.weight"].shape[0] == 258
    )
    command("import", exported, tmp_path / "back")
    mine, back = (load_run(str(path), torch.device("cpu")) for path in (run, tmp_path / "back"))
    assert back.tokenizer.fingerprint == mine.tokenizer.fingerprint
    for name, tensor in mine.model.state_dict().items():
        assert torch.equal(back.model.state_dict()[name], tensor[:258] if name == "embedding.weight" else tensor)
    capsys.readouterr()
    command("generate", tmp_path / "back", "-p", "a", "-n", "3")
    assert capsys.readouterr().out


def test_safetensors_is_a_run_folder_of_its_own(run, tmp_path):
    command("export", run, tmp_path / "bare", "--to", "safetensors", "--dtype", "bf16")
    assert sorted(path.name for path in (tmp_path / "bare").iterdir()) == [
        "config.yaml",
        "tokenizer.json",
        "weights.safetensors",
    ]
    loaded = load_run(str(tmp_path / "bare"), torch.device("cpu"))
    assert loaded.model.embedding.weight.dtype == torch.bfloat16


def test_a_model_travels_with_its_code(tmp_path, capsys):
    path = tmp_path / "run"
    path.mkdir()
    untrained_run(path, HYBRID | {"pattern": "M3 L", "logit_softcap": 15.0})
    command("export", path, tmp_path / "native", code=2)
    assert "--to hf-code" in capsys.readouterr().err
    command("export", path, tmp_path / "code", "--to", "hf-code", "--arch", "llama", code=2)
    command("export", path, tmp_path / "code", "--to", "hf-code", "--dtype", "bf16")
    assert json.loads((tmp_path / "code/config.json").read_text())["dtype"] == "bfloat16"
    assert "trust_remote_code=True" in (tmp_path / "code/README.md").read_text()
    command("import", tmp_path / "code", tmp_path / "back")
    mine, back = (load_run(str(path), torch.device("cpu")) for path in (path, tmp_path / "back"))
    mine.model.round_parameters(torch.bfloat16)
    for name, tensor in mine.model.state_dict().items():
        assert torch.equal(back.model.state_dict()[name], tensor[:258] if name == "embedding.weight" else tensor)
    assert [layer.params for layer in back.model.config.layers] == [layer.params for layer in mine.model.config.layers]


@pytest.mark.slow
@pytest.mark.parametrize("preset", groups()["model"])
def test_every_preset_travels_with_its_code(preset, tmp_path):
    section = compose_config([f"model={preset}", "size=tiny"]).model
    (tmp_path / "run").mkdir()
    path = untrained_run(tmp_path / "run", section)
    agreement = export_code(load_run(str(path), torch.device("cpu")), tmp_path / "out").agreement
    assert max(agreement.logits, agreement.decode) < 1e-5
    print(preset, agreement)


def test_an_existing_folder_is_left_alone(run, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    command("export", run, tmp_path / "mine", code=2)
    command("import", run, tmp_path / "mine", code=2)
    assert capsys.readouterr().err.count("\n") == 2
    assert not list((tmp_path / "mine").iterdir())


def test_a_model_that_nothing_represents_is_refused_with_the_way_out():
    section = validate_model(HYBRID | {"logit_softcap": 15.0, "attention": {"n_heads": 2, "qk_norm": True}})
    with pytest.raises(UserError) as refused:
        choose(section)
    text = "\n".join(refused.value.problems)
    assert "model.logit_softcap=null" in text
    assert "model.attention.qk_norm=false" in text
    with pytest.raises(UserError, match="llama"):
        choose(section, "gpt2")


def test_a_difference_names_the_layer_and_leaves_nothing(run, tmp_path, monkeypatch):
    real = reference.write_reference

    def damaged(path, model, tokenizer, layer_ends):
        with torch.no_grad():
            model.blocks[1].mixer.q_proj.weight.mul_(1.01)
        real(path, model, tokenizer, layer_ends)

    monkeypatch.setattr("hybridlm.interop.export.write_reference", damaged)
    with pytest.raises(RunFailed, match="layer 1"):
        export_hf(load_run(str(run), torch.device("cpu")), tmp_path / "out" / "x")
    assert not (tmp_path / "out").exists()
