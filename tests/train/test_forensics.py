"""The cause of a bad step: the first layer, or else the first parameter of the backward, that is not finite."""

from __future__ import annotations

import contextlib

import pytest
import torch

from hybridlm.cli.compose import compose_config
from hybridlm.model.build import fresh_model
from hybridlm.model.lm import HybridLM
from hybridlm.train.guards import Cause, find_cause


@pytest.fixture
def model(tiny) -> HybridLM:
    return fresh_model(compose_config([*tiny, "model.pattern=MMM"]).model, 257, seed=0, device="cpu")


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    ids = torch.arange(32).reshape(2, 16)
    return {"ids": ids, "targets": ids + 1}


def cause(model, batch) -> Cause:
    return find_cause(model, [batch, batch], contextlib.nullcontext())


def test_the_first_layer_whose_output_is_not_finite_is_named(model, batch):
    for layer in (1, 2):
        model.blocks[layer].mixer.out_proj.weight.data.fill_(torch.nan)
    found = cause(model, batch)
    assert (found.what, found.place.split(".")[:2]) == ("output", ["blocks", "1"])
    assert "layer 1" in str(found)
    assert not any(module._forward_hooks for module in model.modules())


def test_otherwise_the_first_gradient_of_the_backward_and_otherwise_the_norm(model, batch):
    assert cause(model, batch).what == "norm"
    model(batch["ids"], targets=batch["targets"]).loss_sum.backward()
    for name in ("embedding.weight", "blocks.1.mixer.out_proj.weight"):
        model.get_parameter(name).grad.fill_(torch.inf)
    found = cause(model, batch)
    assert (found.what, found.place) == ("gradient", "blocks.1.mixer.out_proj.weight")
