"""Every architecture of transformers: a model exported as it computes the same there, and comes back bit for bit."""

from __future__ import annotations

import shlex

import pytest
import torch
from architecture_cases import ATTENTION, CASES, MAMBA, VOCAB, model_of, write_folder
from safetensors.torch import load_file

from hybridlm.cli.compose import compose_config
from hybridlm.config.load import validate_model
from hybridlm.config.run import RunConfig
from hybridlm.interop.architecture import advice
from hybridlm.interop.architectures import ARCHITECTURES
from hybridlm.interop.export import weights_of
from hybridlm.interop.foreign import read_config, read_tensors
from hybridlm.interop.links import exported, imported
from hybridlm.interop.reference import TOLERANCE
from hybridlm.model.build import build_model

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture
def folder(case, tmp_path):
    """The exported model."""
    write_folder(tmp_path, case)
    return tmp_path


@every_case
def test_transformers_computes_the_same(case, folder):
    model, ids = model_of(case), torch.randint(VOCAB, (2, 21), generator=torch.Generator().manual_seed(1))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if hasattr(theirs, "set_experts_implementation"):
        theirs.set_experts_implementation("eager")
    with torch.no_grad():
        ours, got = model(ids).logits, theirs(ids, use_cache=False).logits
        assert (ours - got).abs().max() < TOLERANCE * ours.abs().max()
        theirs.generation_config.eos_token_id = None
        written = theirs.generate(
            ids[:, :7],
            attention_mask=torch.ones(2, 7),
            max_new_tokens=8,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
        ours = model(written.sequences).logits[:, 6:-1]
        assert (ours - torch.stack(written.logits, 1)).abs().max() < 10 * TOLERANCE * ours.abs().max()


@every_case
def test_import_gives_the_model_back(case, folder):
    model = model_of(case)
    found = read_config(folder)
    architecture, config = found.architecture, found.section
    assert found.vocab == VOCAB
    back = imported(architecture.links(config), read_tensors(folder), "here")
    expected = weights_of(model)
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], expected[name]) for name in expected)
    again = build_model(config, VOCAB)
    again.load_state_dict(back, assign=True)
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, model(ids).logits)
    assert exported(architecture.links(config), back).keys() == load_file(folder / "model.safetensors").keys()


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda one: one.model_type)
def test_following_the_advice_makes_a_case_exportable(architecture):
    """From a model that violates everything which an override can lift."""
    case = next(case for case in CASES if case.startswith(architecture.name))
    wrong = CASES[case] | {"logit_softcap": 15.0}
    kinds = set(validate_model({"d_model": 32} | wrong).kinds)
    if "mlp" in kinds:
        other = {"swiglu": "relu2", "relu2": "swiglu"}[wrong.get("mlp", {}).get("activation", "swiglu")]
        wrong["mlp"] = {"activation": other}
    if "mamba2" in kinds:
        wrong["mamba2"] = MAMBA | {"norm_before_gate": True, "dt_limit": (0.1, 1.0)}
    wrong = validate_model({"d_model": 32, "attention": ATTENTION, "mamba2": MAMBA} | wrong)
    needs = advice(architecture, wrong)
    assert needs
    overrides = [word for need in needs for word in shlex.split(" ".join(need.overrides))]
    assert not list(architecture.needs(compose_config(overrides, base=RunConfig(model=wrong)).model))
