"""The dense feed-forward network against its formula, and what it promises as an FFN."""

from __future__ import annotations

import math

import pytest
import torch
from recurrences import assert_near, mlp

from hybridlm.config.ffns.mlp import MLPSpec
from hybridlm.layers.init import Init
from hybridlm.layers.mlp import MLP

SPECS = {activation: MLPSpec(d_model=4, d_ff=6, activation=activation) for activation in ("swiglu", "relu2")}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@every_spec
def test_output_and_gradients(spec):
    layer = MLP(spec).double()
    with torch.no_grad():
        for i, parameter in enumerate(layer.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=i))
    x = draw(2, 3, 4, seed=7).requires_grad_()
    leaves = {"x": x, **dict(layer.named_parameters())}
    results = []
    for y in (layer(x)[0], mlp(dict(layer.named_parameters()), x, spec)):
        grads = torch.autograd.grad((y * draw(2, 3, 4, seed=8)).sum(), list(leaves.values()))
        results.append({"y": y} | dict(zip(leaves, grads, strict=True)))
    assert_near(*results, 1e-12)
    assert layer(x)[1] is None


@pytest.mark.parametrize(("activation", "matrices"), [("swiglu", 3), ("relu2", 2)])
def test_parameters_and_flops(activation, matrices):
    layer = MLP(SPECS[activation])
    assert sum(parameter.numel() for parameter in layer.parameters()) == matrices * 24
    assert layer.flops("decode") == layer.flops("prefill") == 2 * matrices * 24
    assert layer.flops("train") == 3 * layer.flops("prefill")


@every_spec
@pytest.mark.parametrize(("residual", "factor"), [("depth", 1 / math.sqrt(10)), ("zero", 0.0), ("none", 1.0)])
def test_reset_draws_every_matrix(spec, residual, factor):
    layer = MLP(MLPSpec(64, 128, spec.activation))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(math.nan)
    torch.manual_seed(0)
    layer.reset_parameters(Init(std=None, residual=residual, n_layers=5))
    for name, parameter in layer.named_parameters():
        want = factor * 128**-0.5 if name == "down_proj.weight" else 64**-0.5
        assert float(parameter.detach().std()) == pytest.approx(want, rel=0.03), name


@every_spec
def test_every_matrix_is_declared(spec):
    layer = MLP(spec)
    specs = layer.param_specs()
    assert specs.keys() == dict(layer.named_parameters()).keys()
    assert all(declared.decay and declared.role == "matrix" for declared in specs.values())
