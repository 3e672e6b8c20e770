"""Whole models of transformers, as it saved them: imported, they give the logits that were computed there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hybridlm.interop.foreign import read_config, read_tensors
from hybridlm.interop.links import imported
from hybridlm.model.build import build_model

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("model_*.json"))


@pytest.mark.parametrize("case", CASES)
def test_a_saved_model_is_read(case, tmp_path):
    facts, tensors = json.loads((GOLDEN / f"{case}.json").read_text()), load_file(GOLDEN / f"{case}.safetensors")
    theirs = getattr(transformers, facts["architecture"])._from_config(config_of(facts))
    weights = {name.removeprefix("param."): tensor for name, tensor in tensors.items() if name.startswith("param.")}
    theirs.load_state_dict(weights, strict=False)
    theirs.tie_weights()
    theirs.save_pretrained(tmp_path)
    found = read_config(tmp_path)
    model = build_model(found.section, found.vocab)
    links = found.architecture.links(found.section)
    model.load_state_dict(imported(links, read_tensors(tmp_path), case), assign=True)
    with torch.no_grad():
        logits = model.eval()(tensors["input_ids"]).logits
    assert (logits - tensors["logits"]).abs().max() < facts["tolerance"]["logits"] * tensors["logits"].abs().max()


def config_of(facts):
    fields = {name: value for name, value in facts["config"].items() if name != "time_step_limit"}
    return transformers.AutoConfig.for_model(**fields)
