"""What every mixer promises, for every option of each kind: one function however the text is cut, causal, rows apart, equal to its
recurrence, its state as large as announced, its weights all drawn and declared."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixer_specs import ATTENTION, CPU, GQA, MAMBA2, SPECS, forward, forward_in_pieces, make_input, make_mixer, recurrence
from recurrences import assert_near, relative_error

from hybridlm.config.layers import AttentionSpec
from hybridlm.layers.init import Init
from hybridlm.layers.sequence import SequenceInfo

TIME = 17
INIT = Init(std=None, residual="depth", n_layers=3)
every_mixer = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@every_mixer
def test_output_and_every_gradient_is_the_recurrences(spec):
    mixer, x = make_mixer(spec), make_input(2, TIME).requires_grad_()
    weights = make_input(2, TIME, seed=5)
    leaves = {"x": x, **dict(mixer.named_parameters())}
    results = []
    for y in (forward(mixer, x), recurrence(spec, dict(mixer.named_parameters()), x)):
        grads = torch.autograd.grad((y * weights).sum(), list(leaves.values()))
        results.append({"y": y} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)})
    if spec.__dict__.get("window") == 1:  # each token attends to itself: queries and keys do not matter
        for name in ("dq_proj.weight", "dk_proj.weight"):
            assert max(float(result.pop(name).abs().max()) for result in results) < 1e-12
    assert_near(*results, 1e-10)


@every_mixer
@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(cuts=st.sets(st.integers(1, TIME - 1)))
def test_any_cut_of_the_text_gives_the_same(spec, cuts):
    """Prefill, chunked prefill, decode and any mixture are one function; so is what they leave in the cache."""
    mixer, x = make_mixer(spec), make_input(2, TIME)
    whole, cache = forward_in_pieces(mixer, x, [], TIME)
    assert relative_error(whole, forward(mixer, x)) < 1e-12
    pieces, cut_cache = forward_in_pieces(mixer, x, sorted(cuts), TIME)
    assert relative_error(pieces, whole) < 1e-10
    for name, tensor in cache.tensors().items():
        assert tensor.numel() == 0 or relative_error(cut_cache.tensors()[name], tensor) < 1e-10, name


@every_mixer
@pytest.mark.parametrize("seed", range(3))
def test_any_cut_in_float32(spec, seed):
    mixer, x = make_mixer(spec, torch.float32), make_input(2, TIME, torch.float32)
    cuts = sorted(random.Random(seed).sample(range(1, TIME), [3, 8, TIME - 1][seed]))
    pieces, _ = forward_in_pieces(mixer, x, cuts, TIME + 5)
    assert pieces.dtype == torch.float32
    assert relative_error(pieces, forward(mixer, x)) < 1e-4
    assert relative_error(pieces, forward(make_mixer(spec), x.double())) < 1e-4


@every_mixer
def test_no_token_sees_the_future(spec):
    mixer, x = make_mixer(spec), make_input(2, TIME)
    y = forward(mixer, x).detach()
    for t in (1, 7, 8, TIME - 1):
        changed = x.clone()
        changed[:, t] += 1.0
        y_changed = forward(mixer, changed).detach()
        assert float((y_changed[:, :t] - y[:, :t]).abs().max()) <= 1e-12, t
        assert float((y_changed[:, t] - y[:, t]).abs().max()) > 1e-3, t


@pytest.mark.parametrize("window", [1, 3, TIME])
@pytest.mark.parametrize("cuts", [[], list(range(5, TIME))], ids=["whole", "decoded"])
def test_a_window_ends_where_it_says(window, cuts):
    """With window w, token t is the last thing that token t + w - 1 sees, and nothing to token t + w."""
    mixer, x, t = make_mixer(replace(GQA, window=window)), make_input(1, TIME), 0 if window == TIME else 6
    changed = x.clone()
    changed[:, t] += 1.0
    difference = (forward_in_pieces(mixer, changed, cuts, TIME)[0] - forward_in_pieces(mixer, x, cuts, TIME)[0]).abs().amax((0, 2))
    assert bool((difference[t : t + window] > 1e-6).all())
    assert bool((difference[t + window :] == 0).all())


@every_mixer
@pytest.mark.parametrize("cuts", [[], [4, 5, 6]], ids=["whole", "pieces"])
def test_rows_of_a_batch_do_not_meet(spec, cuts):
    mixer, x = make_mixer(spec), make_input(3, TIME)
    together, _ = forward_in_pieces(mixer, x, cuts, TIME)
    for row in range(3):
        alone, _ = forward_in_pieces(mixer, x[row : row + 1], cuts, TIME)
        assert relative_error(together[row : row + 1], alone) < 1e-12


@every_mixer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_cache_is_as_large_as_announced(spec, dtype):
    mixer = make_mixer(spec)
    for context in (1, 2, 3, 4, TIME, 100, 101):
        for batch in (1, 3):
            cache = mixer.new_cache(batch, context, dtype=dtype, device=CPU)
            assert sum(tensor.nbytes for tensor in cache.tensors().values()) == mixer.state_bytes(context, batch, dtype)


def test_state_bytes_by_hand():
    mamba = make_mixer(replace(MAMBA2, n_groups=2))
    conv, ssm = 3 * (16 + 2 * 2 * 3), 4 * 4 * 3  # K - 1 columns of [x, B, C]; H P N
    assert mamba.state_bytes(1000, 5, torch.float32) == 5 * 4 * (conv + ssm)
    assert mamba.state_bytes(1, 5, torch.bfloat16) == 5 * (2 * conv + 4 * ssm), "the scan's state stays float32"
    keys_and_values = 2 * 2 * 6  # of one token: k and v of two heads of six
    assert make_mixer(GQA).state_bytes(100, 3, torch.float32) == 3 * 4 * 100 * keys_and_values
    window = make_mixer(replace(GQA, window=8))
    assert window.state_bytes(100, 3, torch.bfloat16) == 3 * 2 * 7 * keys_and_values, "what a new token may see beside itself"
    assert window.state_bytes(5, 3, torch.bfloat16) == 3 * 2 * 5 * keys_and_values


def test_a_full_cache_refuses_politely():
    mixer, x = make_mixer(ATTENTION), make_input(1, 5)
    with pytest.raises(ValueError, match=r"4 tokens, 5 are needed"):
        forward_in_pieces(mixer, x, [3], 4)


@pytest.mark.parametrize("name", ["attention", "attention_window"])
def test_a_narrow_cache_only_rounds(name):
    """A bfloat16 cache under a float32 layer: the same text up to rounding, in float32."""
    mixer, x = make_mixer(SPECS[name], torch.float32), make_input(2, TIME, torch.float32)
    pieces, cache = forward_in_pieces(mixer, x, list(range(4, TIME)), TIME, cache_dtype=torch.bfloat16)
    assert cache.tensors()["k"].dtype == torch.bfloat16
    assert pieces.dtype == torch.float32
    assert 0 < relative_error(pieces, forward(mixer, x)) < 2e-2


# FLOPs per token; a multiply-add counts two.


def test_attention_flops_by_hand():
    mixer = make_mixer(GQA)  # D 8, 4 query and 2 key heads of 6
    projections = 2 * (8 * 24 + 8 * 12 + 8 * 12 + 24 * 8)
    per_key = 2 * 2 * 24  # a score and its share of the values, over all heads
    assert mixer.flops(1, "prefill") == projections + per_key
    assert mixer.flops(5, "prefill") == projections + per_key * (1 + 2 + 3 + 4 + 5) / 5
    window = make_mixer(replace(GQA, window=3))
    assert window.flops(5, "prefill") == projections + per_key * (1 + 2 + 3 + 3 + 3) / 5
    assert window.flops(2, "prefill") == mixer.flops(2, "prefill")
    assert window.flops(100, "decode") == projections + per_key * 3


def test_a_decoded_token_also_attends_to_itself():
    """ "one token decoded after ``context`` others": it sees them and itself."""
    mixer = make_mixer(GQA)
    assert mixer.flops(10, "decode") - mixer.flops(0, "decode") == 2 * 2 * 24 * 10
    assert mixer.flops(0, "decode") == mixer.flops(1, "prefill")


def test_mamba2_flops_by_hand():
    mixer = make_mixer(replace(MAMBA2, n_groups=2))  # D 8, d_inner 16, N 3, G 2, K 4, H 4, chunks of 8
    projections = 2 * 8 * (16 + 16 + 6 + 6 + 4) + 2 * 16 * 8
    conv = 2 * 4 * (16 + 6 + 6)
    state = 2 * 16 * 3 + 2 * 16 * 3  # written and read
    assert mixer.flops(1000, "decode") == projections + conv + state
    tile = 2 * 8 * 2 * 3 + 2 * 8 * 16  # scores of both groups, then values of all heads, against the chunk's 8 tokens
    assert mixer.flops(1000, "prefill") == projections + conv + state + tile
    assert mixer.flops(4, "prefill") == projections + conv + state + tile / 2


@every_mixer
def test_training_is_three_prefills_and_flops_do_not_fall(spec):
    mixer = make_mixer(spec)
    assert mixer.flops(64, "train") == 3 * mixer.flops(64, "prefill")
    for phase in ("prefill", "decode"):
        costs = [mixer.flops(context, phase) for context in (1, 2, 8, 64, 1000)]
        assert costs == sorted(costs), phase
        assert costs[0] > 0


# Weights.


@every_mixer
@pytest.mark.parametrize("residual", ["depth", "zero", "none"])
def test_reset_leaves_no_parameter_out(spec, residual):
    mixer = make_mixer(spec, torch.float32)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.fill_(math.nan)
    mixer.reset_parameters(replace(INIT, residual=residual))
    assert [name for name, parameter in mixer.named_parameters() if not bool(parameter.isfinite().all())] == []


@pytest.mark.parametrize(("residual", "factor"), [("depth", 1 / math.sqrt(2 * 3)), ("none", 1.0), ("zero", 0.0)])
@pytest.mark.parametrize("std", [None, 0.3])
@pytest.mark.parametrize("kind", ["attention", "mamba2"])
def test_projections_are_drawn_with_their_std(kind, std, residual, factor):
    """Inputs of 64 channels; the projection back has 128. std None is fan_in ** -0.5."""
    if kind == "attention":
        mixer, outward = make_mixer(replace(ATTENTION, d_model=64, n_heads=4, n_kv_heads=4, head_dim=32), torch.float32), "o_proj"
    else:
        mixer, outward = make_mixer(replace(MAMBA2, d_model=64, n_heads=8, head_dim=16), torch.float32), "out_proj"
    torch.manual_seed(0)
    mixer.reset_parameters(Init(std=std, residual=residual, n_layers=3))
    for name, parameter in mixer.named_parameters():
        if name == f"{outward}.weight":
            assert float(parameter.detach().std()) == pytest.approx(factor * (std or 128**-0.5), rel=0.03)
        elif name.endswith("proj.weight"):
            assert float(parameter.detach().std()) == pytest.approx(std or 64**-0.5, rel=0.03)
            assert float(parameter.detach().mean()) == pytest.approx(0, abs=0.05 * (std or 64**-0.5))


def distance_from_uniform(values: torch.Tensor, low: float, high: float) -> float:
    """Kolmogorov-Smirnov distance of a sample from U(low, high)."""
    ordered = ((values.double().sort().values - low) / (high - low)).clamp(0, 1)
    steps = torch.arange(len(ordered) + 1, dtype=torch.float64) / len(ordered)
    return float(torch.maximum((ordered - steps[:-1]).abs().max(), (ordered - steps[1:]).abs().max()))


def test_mamba2_steps_and_decays_are_drawn_as_published():
    """dt log-uniform in dt_range, -A uniform in a_range, D one; 4,000 heads tell the distributions apart."""
    mixer = make_mixer(replace(MAMBA2, d_model=2, n_heads=4000, head_dim=1, dt_range=(2e-3, 0.2), a_range=(1.0, 16.0)), torch.float32)
    torch.manual_seed(0)
    mixer.reset_parameters(INIT)
    dt, decay = torch.nn.functional.softplus(mixer.dt_bias.detach().double()), mixer.A_log.detach().double().exp()
    assert 2e-3 * (1 - 1e-4) <= float(dt.min()) < 2.2e-3
    assert 0.18 < float(dt.max()) <= 0.2 * (1 + 1e-4)
    assert 1 - 1e-5 <= float(decay.min()) < 1.1
    assert 15.9 < float(decay.max()) <= 16 + 1e-4
    assert distance_from_uniform(dt.log(), math.log(2e-3), math.log(0.2)) < 0.026  # 1% of true samples are further off
    assert distance_from_uniform(decay, 1.0, 16.0) < 0.026
    assert torch.equal(mixer.D, torch.ones(4000))
    assert torch.equal(mixer.norm.weight, torch.ones(4000))


def test_mamba2_steps_have_a_floor():
    mixer = make_mixer(replace(MAMBA2, dt_range=(1e-7, 1e-6)), torch.float32)
    mixer.reset_parameters(INIT)
    assert torch.allclose(torch.nn.functional.softplus(mixer.dt_bias), torch.tensor(1e-4), rtol=1e-3)


@every_mixer
def test_every_parameter_is_declared_once(spec):
    mixer = make_mixer(spec)
    specs = mixer.param_specs()
    shapes = {name: tuple(parameter.shape) for name, parameter in mixer.named_parameters()}
    assert specs.keys() == shapes.keys()
    for name, declared in specs.items():
        assert declared.decay == (name.endswith("proj.weight")), name
        assert declared.role == ("matrix" if declared.decay else "vector"), name
        assert not declared.row_blocks or sum(declared.row_blocks) == shapes[name][0], name


def test_mamba2_declares_its_fused_rows_and_exact_parameters():
    specs = make_mixer(replace(MAMBA2, n_groups=2)).param_specs()
    assert specs["in_proj.weight"].row_blocks == (16, 16, 6, 6, 4)  # z, x, B, C, dt
    assert {name for name, spec in specs.items() if spec.dtype == "fp32"} == {"A_log", "D", "dt_bias"}
    assert not any(specs[name].decay for name in ("A_log", "D", "dt_bias", "norm.weight", "conv1d.bias", "conv1d.weight"))


# Mixed precision.


@every_mixer
def test_bfloat16_autocast_keeps_states_and_gradients_sound(spec):
    mixer, x = make_mixer(spec, torch.float32), make_input(2, TIME, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = forward(mixer, x)
        pieces, cache = forward_in_pieces(mixer, x, [6, 7, 8, 12], TIME)
    assert y.dtype == torch.bfloat16
    want = forward(make_mixer(spec), x.double())
    for got in (y, pieces):  # over all entries: a norm over a few channels that nearly cancel magnifies single roundings
        assert float((got - want).detach().norm() / want.detach().norm()) < 3e-2
    assert all(tensor.dtype == torch.float32 for tensor in cache.tensors().values())
    y.float().square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad.dtype == torch.float32
        assert bool(parameter.grad.isfinite().all()), name


def test_mamba2_state_stays_wide_with_bfloat16_activations():
    mixer = make_mixer(MAMBA2, torch.bfloat16)
    x = make_input(2, TIME, torch.bfloat16)
    pieces, cache = forward_in_pieces(mixer, x, [6, 7, 8], TIME)
    assert (pieces.dtype, cache.tensors()["conv"].dtype, cache.tensors()["ssm"].dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert relative_error(pieces, forward(mixer, x)) < 3e-2


def test_rotation_follows_the_positions_it_is_given():
    """Positions come from the model, row by row, not from the place in the tensor."""
    spec = SPECS["attention_rope"]
    assert isinstance(spec, AttentionSpec)
    mixer, x = make_mixer(spec), make_input(2, 5)
    shifted = mixer(x, SequenceInfo(torch.arange(5).expand(2, 5) + 30))
    assert relative_error(shifted, forward(mixer, x)) < 1e-10, "only distances count"
    stretched = mixer(x, SequenceInfo(torch.tensor([[0, 1, 2, 3, 4], [0, 2, 4, 6, 8]])))
    assert torch.equal(stretched[0], forward(mixer, x)[0])
    assert relative_error(stretched[1], forward(mixer, x)[1]) > 1e-3
