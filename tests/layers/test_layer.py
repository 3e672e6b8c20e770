"""What the contract of a layer gives to a kind that says nothing else: fresh weights, declarations, bytes of state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hybridlm.config.ffns import FFNS
from hybridlm.config.mixers import MIXERS
from hybridlm.config.model import ModelConfig
from hybridlm.layers.cache import StateCache
from hybridlm.layers.ffn import FFN
from hybridlm.layers.init import MATRIX, VECTOR, VECTOR_FP32, Init
from hybridlm.layers.layer import Layer, layer_class
from hybridlm.layers.linear import Linear
from hybridlm.layers.mixer import Mixer
from hybridlm.layers.norm import RMSNorm


class Plain(Mixer):
    """A mixer with one parameter of every sort."""

    def __init__(self, width=64):
        super().__init__()
        self.out_proj = Linear(width, width, bias=False)
        self.in_proj = Linear(width, 2 * width)
        self.conv1d = nn.Conv1d(width, width, 4, groups=width, bias=False)
        self.norm = RMSNorm(width)
        self.A_log = nn.Parameter(torch.full((4,), 7.0))

    def forward(self, x, seq, cache=None):
        return x

    def new_cache(self, batch, max_len, *, dtype, device):
        state = torch.zeros(batch, 4, 5, dtype=torch.float32, device=device)
        return StateCache({"state": state, "last": torch.zeros(batch, 3, dtype=dtype, device=device)})

    def flops(self, context, phase):
        return 0.0


def test_fresh_weights():
    """Projections, norms and convolutions; the module's own parameters are its own matter."""
    layer = Plain()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name != "A_log":
                parameter.fill_(math.nan)
    torch.manual_seed(0)
    layer.reset_parameters(Init(std=None, residual="depth", n_layers=8))
    assert float(layer.in_proj.weight.std()) == pytest.approx(1 / 8, rel=0.05)
    assert float(layer.out_proj.weight.std()) == pytest.approx(1 / 8 / 4, rel=0.05)
    assert bool((layer.in_proj.bias == 0).all())
    assert bool((layer.norm.weight == 1).all())
    assert 0.4 < float(layer.conv1d.weight.abs().max()) <= 0.5
    assert bool((layer.A_log == 7).all())


def test_declarations():
    assert Plain().param_specs() == {
        "A_log": VECTOR_FP32,
        "in_proj.weight": MATRIX,
        "in_proj.bias": VECTOR,
        "out_proj.weight": MATRIX,
        "conv1d.weight": VECTOR,
        "norm.weight": VECTOR,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_bytes_are_those_of_a_cache(dtype):
    assert Plain().state_bytes(100, 3, dtype) == 3 * (4 * 5 * 4 + 3 * dtype.itemsize)


def test_a_kind_reports_and_asks_for_nothing_by_default():
    layer = Plain()
    assert layer.metrics() == {}
    assert tuple(layer.kernel_needs(None, None)) == ()
    assert not layer.shares_tables


@pytest.mark.parametrize(("registry", "contract"), [(MIXERS, Mixer), (FFNS, FFN)], ids=["mixers", "ffns"])
def test_every_registered_kind_has_a_layer(registry, contract):
    for kind, section in registry.items():
        spec = section().resolve(ModelConfig(d_model=64), "")
        with torch.device("meta"):
            layer = layer_class(spec)(spec)
        assert isinstance(layer, contract)
        assert layer.param_specs().keys() == dict(layer.named_parameters()).keys(), kind
        assert layer.flops("prefill") > 0 if contract is FFN else layer.flops(8, "decode") > 0
        assert issubclass(type(layer), Layer)


@pytest.mark.parametrize("kind", [kind for kind in MIXERS if kind.startswith("mamba")])
def test_a_mamba_reports_its_step_sizes(kind):
    spec = MIXERS[kind](dt_range=(0.02, 0.02)).resolve(ModelConfig(d_model=64), "")
    layer = layer_class(spec)(spec)
    layer.reset_parameters(Init(std=None, residual="depth", n_layers=1))
    metrics = layer.metrics()
    assert set(metrics) == {"ssm/dt_mean", "ssm/dt_max"}
    assert all(float(value) == pytest.approx(0.02, rel=1e-3) for value in metrics.values())
