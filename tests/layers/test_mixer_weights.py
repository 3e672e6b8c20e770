"""How a mixer's weights are drawn, and what it declares about each."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from mixer_specs import ATTENTION, GDN, KDA, MAMBA1, MAMBA2, MAMBA3, MLA, every_mixer, forward, make_input, make_mixer
from torch import Tensor
from torch.nn.functional import softplus

from hybridlm.layers.init import Init

INIT = Init(std=None, residual="depth", n_layers=3)
WIDE = {  # inputs of 64 channels, matrices of some thousand entries
    "attention": replace(ATTENTION, d_model=64, n_heads=4, n_kv_heads=4, head_dim=32),
    "mamba1": replace(MAMBA1, d_model=64, d_inner=128, dt_rank=30, d_state=30),
    "mamba2": replace(MAMBA2, d_model=64, n_heads=8, head_dim=16),
    "mamba3": replace(MAMBA3, d_model=64, n_heads=8, head_dim=16),
    "mamba3_mimo": replace(MAMBA3, d_model=64, n_heads=8, head_dim=16, mimo_rank=4),
    "gdn": replace(GDN, d_model=64, n_k_heads=32, n_v_heads=32),
    "kda": replace(KDA, d_model=64, n_k_heads=32, n_v_heads=32, head_v_dim=64, gate_bias=True),
    "mla": replace(MLA, d_model=64, n_heads=4, kv_lora_rank=50, q_lora_rank=40, qk_nope_head_dim=24, v_head_dim=32),
}


@every_mixer
@pytest.mark.parametrize("residual", ["depth", "zero", "none"])
def test_reset_leaves_no_parameter_out(spec, residual):
    mixer = make_mixer(spec, torch.float32)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.fill_(math.nan)
    mixer.reset_parameters(replace(INIT, residual=residual))
    assert [name for name, parameter in mixer.named_parameters() if not bool(parameter.isfinite().all())] == []
    assert bool(forward(mixer, make_input(2, 9, torch.float32)).eq(0).all()) == (residual == "zero")


@pytest.mark.parametrize(("residual", "factor"), [("depth", 1 / math.sqrt(2 * 3)), ("none", 1.0), ("zero", 0.0)])
@pytest.mark.parametrize("std", [None, 0.3])
@pytest.mark.parametrize("kind", WIDE)
def test_projections_are_drawn_with_their_std(kind, std, residual, factor):
    """std None is fan_in ** -0.5. The projection of Mamba-1's step has a distribution of its own."""
    mixer = make_mixer(WIDE[kind], torch.float32)
    torch.manual_seed(0)
    mixer.reset_parameters(Init(std=std, residual=residual, n_layers=3))
    checked = 0
    for name, parameter in mixer.named_parameters():
        if "proj" not in name or not name.endswith("weight") or name == "dt_proj.weight":
            continue
        want = std or parameter.shape[1] ** -0.5
        scale = factor if name in ("o_proj.weight", "out_proj.weight") else 1.0
        assert float(parameter.detach().std()) == pytest.approx(scale * want, rel=0.04), name
        assert float(parameter.detach().mean()) == pytest.approx(0, abs=0.06 * want), name
        checked += 1
    assert checked >= 2


def distance_from_uniform(values: Tensor, low: float, high: float) -> float:
    """Kolmogorov-Smirnov distance of a sample from U(low, high)."""
    ordered = ((values.double().sort().values - low) / (high - low)).clamp(0, 1)
    steps = torch.arange(len(ordered) + 1, dtype=torch.float64) / len(ordered)
    return float(torch.maximum((ordered - steps[:-1]).abs().max(), (ordered - steps[1:]).abs().max()))


MANY = {"d_model": 2, "dt_range": (2e-3, 0.2)}  # 4,000 heads or channels tell the distributions apart
STEPS = {
    "mamba1": (replace(MAMBA1, d_inner=4000, **MANY), "dt_proj.bias"),
    "mamba2": (replace(MAMBA2, n_heads=4000, head_dim=1, **MANY), "dt_bias"),
    "mamba3": (replace(MAMBA3, n_heads=4000, head_dim=1, **MANY), "dt_bias"),
}


@pytest.mark.parametrize("kind", STEPS)
def test_steps_are_drawn_as_published(kind):
    """dt log-uniform in dt_range; 1% of true samples are further from it."""
    spec, name = STEPS[kind]
    mixer = make_mixer(spec, torch.float32)
    torch.manual_seed(0)
    mixer.reset_parameters(INIT)
    dt = softplus(mixer.get_parameter(name).detach().double())
    assert 2e-3 * (1 - 1e-4) <= float(dt.min()) < 2.2e-3
    assert 0.18 < float(dt.max()) <= 0.2 * (1 + 1e-4)
    assert distance_from_uniform(dt.log(), math.log(2e-3), math.log(0.2)) < 0.026


@pytest.mark.parametrize("kind", STEPS)
def test_steps_have_a_floor(kind):
    spec, name = STEPS[kind]
    mixer = make_mixer(replace(spec, dt_range=(1e-7, 1e-6)), torch.float32)
    mixer.reset_parameters(INIT)
    assert torch.allclose(softplus(mixer.get_parameter(name)), torch.tensor(1e-4), rtol=1e-3)


def test_mamba1_decays_and_skips_are_drawn_as_published():
    """A_log is log(1..N) in every channel; the projection of the step is uniform within rank ** -0.5."""
    mixer = make_mixer(replace(MAMBA1, d_inner=1000, d_state=5, dt_rank=4), torch.float32)
    torch.manual_seed(0)
    mixer.reset_parameters(INIT)
    assert torch.allclose(mixer.get_parameter("A_log").exp(), torch.arange(1.0, 6.0).expand(1000, 5))
    assert torch.equal(mixer.get_parameter("D"), torch.ones(1000))
    weight = mixer.get_parameter("dt_proj.weight").detach()
    assert 0.49 < float(weight.abs().max()) <= 0.5
    assert distance_from_uniform(weight.flatten(), -0.5, 0.5) < 0.026


def test_mamba2_decays_and_skips_are_drawn_as_published():
    """-A uniform in a_range, D one."""
    mixer = make_mixer(replace(MAMBA2, d_model=2, n_heads=4000, head_dim=1, a_range=(1.0, 16.0)), torch.float32)
    torch.manual_seed(0)
    mixer.reset_parameters(INIT)
    decay = mixer.get_parameter("A_log").detach().double().exp()
    assert 1 - 1e-5 <= float(decay.min()) < 1.1
    assert 15.9 < float(decay.max()) <= 16 + 1e-4
    assert distance_from_uniform(decay, 1.0, 16.0) < 0.026
    assert torch.equal(mixer.get_parameter("D"), torch.ones(4000))
    assert torch.equal(mixer.get_parameter("norm.weight"), torch.ones(4000))


@pytest.mark.parametrize("rank", [None, 1, 4])
def test_mamba3_starts_as_published(rank):
    mixer = make_mixer(replace(MAMBA3, mimo_rank=rank, outproj_norm=True), torch.float32)
    mixer.reset_parameters(INIT)
    want = dict.fromkeys(("B_bias", "C_bias", "B_norm.weight", "C_norm.weight", "D", "norm.weight"), 1.0)
    if rank is not None:
        want |= {"mimo_x": 1 / rank, "mimo_z": 1.0, "mimo_o": 1 / rank}
    for name, value in want.items():
        assert bool((mixer.get_parameter(name) == value).all()), name
    shapes = {name: tuple(parameter.shape) for name, parameter in mixer.named_parameters()}
    assert shapes["B_bias"] == shapes["C_bias"] == (4, rank or 1, 6)
    assert {name for name in shapes if name.startswith("mimo")} == {name for name in want if name.startswith("mimo")}


@pytest.mark.parametrize("spec", [MAMBA1, MAMBA2, replace(MAMBA3, use_conv=True)], ids=["mamba1", "mamba2", "mamba3"])
def test_convolutions_are_drawn_like_a_conv1d(spec):
    """Uniform within K ** -0.5, the fan-in of a depthwise filter."""
    size = {"d_inner": 600} if spec is MAMBA1 else {"n_heads": 150}
    mixer = make_mixer(replace(spec, **size), torch.float32)
    torch.manual_seed(0)
    mixer.reset_parameters(INIT)
    for name in ("conv1d.weight", "conv1d.bias"):
        taps = mixer.get_parameter(name).detach().flatten()
        assert float(taps.abs().max()) <= 0.5
        assert distance_from_uniform(taps, -0.5, 0.5) < 1.63 * len(taps) ** -0.5, name


@every_mixer
def test_every_parameter_is_declared_once(spec):
    """Matrices decay; norms, biases, convolutions, rates and MIMO's factors do not."""
    mixer = make_mixer(spec)
    specs = mixer.param_specs()
    shapes = {name: tuple(parameter.shape) for name, parameter in mixer.named_parameters()}
    assert specs.keys() == shapes.keys()
    for name, declared in specs.items():
        assert declared.decay == ("proj" in name and name.endswith("weight")), name
        assert declared.role == ("matrix" if declared.decay else "vector"), name
        assert not declared.row_blocks or sum(declared.row_blocks) == shapes[name][0], name


FUSED = {
    "mamba1": (MAMBA1, {"in_proj.weight": (16, 16), "x_proj.weight": (1, 3, 3)}),  # x, z; step, B, C
    "mamba2": (replace(MAMBA2, n_groups=2), {"in_proj.weight": (16, 16, 6, 6, 4)}),  # z, x, B, C, dt
    "mamba3": (
        replace(MAMBA3, n_groups=2),
        {"in_proj.weight": (16, 16, 12, 12, 4, 4, 4, 1)},
    ),  # z, x, B, C, dt, A, trap, angle
    "mla": (MLA, {"kv_a_proj_with_mqa.weight": (5, 4)}),  # latent, shared key
    "gdn": (GDN, {"q_proj.weight": ()}),  # none is fused
    "kda": (KDA, {"q_proj.weight": ()}),
}
EXACT = {
    "mamba1": {"A_log", "D", "dt_proj.bias"},
    "mamba2": {"A_log", "D", "dt_bias"},
    "mamba3": {"B_bias", "C_bias", "D", "dt_bias", "mimo_x", "mimo_z", "mimo_o"},
    "mla": set(),
    "gdn": {"A_log", "dt_bias"},
    "kda": {"A_log", "dt_bias"},
}


@pytest.mark.parametrize("kind", FUSED)
def test_fused_rows_are_declared(kind):
    spec, fused = FUSED[kind]
    specs = make_mixer(spec).param_specs()
    for name, blocks in fused.items():
        assert specs[name].row_blocks == blocks, name


@pytest.mark.parametrize("kind", EXACT)
def test_what_must_not_be_rounded_is_declared(kind):
    spec = replace(MAMBA3, mimo_rank=2, outproj_norm=True) if kind == "mamba3" else FUSED[kind][0]
    assert {name for name, declared in make_mixer(spec).param_specs().items() if declared.dtype == "fp32"} == EXACT[
        kind
    ]
