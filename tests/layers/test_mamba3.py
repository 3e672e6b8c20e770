"""What is Mamba-3's own: the rows of in_proj, which channels make a pair, what an ablation leaves out, and long
decoding."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from mixer_specs import CPU, MAMBA3, MIMO, forward, forward_in_pieces, make_input, make_mixer, states_agree
from recurrences import assert_near, relative_error
from torch import Tensor

from hybridlm.config.mixers.mamba3 import Mamba3Spec
from hybridlm.layers.mamba3 import Mamba3
from hybridlm.layers.sequence import SequenceInfo

TIME = 17
WIDE = replace(MAMBA3, n_groups=2, d_state=8)  # N 8, G 2, so two angles; H 4, P 4
both_kinds = pytest.mark.parametrize("spec", [WIDE, replace(WIDE, mimo_rank=3)], ids=["siso", "mimo"])


def make_layer(spec: Mamba3Spec, **parameters: Tensor) -> Mamba3:
    """With weights of every sign and size, those of ``parameters`` put in their place."""
    layer = make_mixer(spec)
    assert isinstance(layer, Mamba3)
    with torch.no_grad():
        for name, values in parameters.items():
            layer.get_parameter(name).copy_(values)
    return layer


def weights_of(layer: Mamba3) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in layer.named_parameters()}


# Parameters.


@both_kinds
def test_parameters_are_named_and_shaped_as_mamba_ssms(spec):
    rank = spec.rank
    want = {
        "in_proj.weight": (16 + 16 + 2 * rank * 2 * 8 + 3 * 4 + 2, 8),
        "dt_bias": (4,),
        "B_bias": (4, rank, 8),
        "C_bias": (4, rank, 8),
        "B_norm.weight": (8,),
        "C_norm.weight": (8,),
        "D": (4,),
        "out_proj.weight": (8, 16),
    }
    if spec.mimo_rank is not None:
        want |= dict.fromkeys(("mimo_x", "mimo_z", "mimo_o"), (4, rank, 4))
    assert {name: tuple(tensor.shape) for name, tensor in make_layer(spec).named_parameters()} == want
    normed = make_layer(replace(spec, outproj_norm=True, use_conv=True))
    added = {name: tuple(tensor.shape) for name, tensor in normed.named_parameters() if name not in want}
    channels = 16 + 2 * rank * 2 * 8
    assert added == {"norm.weight": (16,), "conv1d.weight": (channels, 1, 4), "conv1d.bias": (channels,)}


def rows_of(spec: Mamba3Spec) -> dict[str, slice]:
    """The rows of in_proj by hand."""
    sizes = {"z": 16, "x": 16, "B": spec.rank * 16, "C": spec.rank * 16, "dt": 4, "A": 4, "trap": 4, "angle": 2}
    bounds = [sum(list(sizes.values())[:i]) for i in range(len(sizes) + 1)]
    return {name: slice(*bounds[i : i + 2]) for i, name in enumerate(sizes)}


def with_rows(layer: Mamba3, rows: slice, values: float | Tensor) -> dict[str, Tensor]:
    weights = weights_of(layer)
    weights["in_proj.weight"][rows] = values
    return weights


@both_kinds
def test_what_each_row_of_in_proj_does(spec):
    rows, x = rows_of(spec), make_input(2, TIME)
    assert spec.n_angles == 2
    layer = make_layer(spec)

    def output(changed: dict[str, Tensor], of: Mamba3Spec = spec) -> Tensor:
        return forward(make_layer(of, **changed), x)

    assert int(output(with_rows(layer, rows["z"], 0.0)).count_nonzero()) == 0, "z gates everything"
    assert int(output(with_rows(layer, rows["x"], 0.0)).count_nonzero()) == 0, "x is all that is written and passed on"
    # Without C, biases included, nothing is read of the state: what B and the steps are does not matter.
    nothing_read = with_rows(layer, rows["C"], 0.0) | {"C_bias": torch.zeros_like(layer.C_bias)}
    other = {name: tensor.clone() for name, tensor in nothing_read.items()}
    for name in ("B", "dt", "A", "trap", "angle"):
        other["in_proj.weight"][rows[name]] += 1.0
    assert torch.equal(output(nothing_read), output(other))
    # A token that writes with no weight leaves nothing but D.
    timeless = weights_of(layer) | {"dt_bias": torch.full((4,), -1e3)}
    timeless["in_proj.weight"][rows["dt"]] = 0.0
    assert relative_error(output(timeless), output(nothing_read)) < 1e-12


@both_kinds
def test_an_ablation_is_the_layer_with_no_angle_or_with_a_lambda_of_one(spec):
    """Of the same weights, but for the rows that the ablation leaves out."""
    rows, x = rows_of(spec), make_input(2, TIME)
    layer = make_layer(spec)
    still = with_rows(layer, rows["angle"], 0.0)
    fewer = still | {"in_proj.weight": still["in_proj.weight"][: rows["angle"].start]}
    assert (
        relative_error(
            forward(make_layer(replace(spec, complex_rope=False), **fewer), x), forward(make_layer(spec, **still), x)
        )
        < 1e-12
    )
    column = 1e3 * torch.ones(8, dtype=torch.float64)  # times x's first channel, which is one: lambda is one
    x[..., 0], euler = 1.0, weights_of(layer)
    euler["in_proj.weight"][rows["trap"]] = column * (torch.arange(8) == 0)
    kept = torch.arange(len(euler["in_proj.weight"]))
    kept = kept[(kept < rows["trap"].start) | (kept >= rows["trap"].stop)]
    fewer = euler | {"in_proj.weight": euler["in_proj.weight"][kept]}
    assert (
        relative_error(
            forward(make_layer(replace(spec, trapezoidal=False), **fewer), x), forward(make_layer(spec, **euler), x)
        )
        < 1e-12
    )
    assert relative_error(forward(make_layer(spec, **euler), x), forward(layer, x)) > 1e-2


@pytest.mark.parametrize(
    ("ablated", "rows", "states"),
    [
        ({}, 4 + 4 + 4 + 2, {"ssm", "angle", "k", "v"}),
        ({"complex_rope": False}, 4 + 4 + 4, {"ssm", "k", "v"}),
        ({"trapezoidal": False}, 4 + 4 + 2, {"ssm", "angle"}),
        ({"complex_rope": False, "trapezoidal": False}, 4 + 4, {"ssm"}),
        ({"complex_rope": False, "trapezoidal": False, "use_conv": True}, 4 + 4, {"ssm", "conv"}),
    ],
    ids=["whole", "no_rope", "euler", "neither", "neither_with_conv"],
)
@both_kinds
def test_an_ablation_leaves_its_rows_and_states_out(spec, ablated, rows, states):
    layer = make_layer(replace(spec, **ablated))
    assert layer.in_proj.weight.shape[0] == 2 * 16 + 2 * spec.rank * 16 + rows
    assert sum(layer.row_blocks) == layer.in_proj.weight.shape[0]
    cache = layer.new_cache(1, 10, dtype=torch.float32, device=CPU)
    assert set(cache.tensors()) == states
    with torch.no_grad():
        layer.float()(make_input(1, 3).float(), SequenceInfo.contiguous(1, 3, 0, CPU), cache)
    assert set(cache.tensors()) == states


# Which channels make a pair.


def permuted(weights: dict[str, Tensor], order: Tensor) -> dict[str, Tensor]:
    """The state's channels in another order: in the rows of B and C, their norms and their biases."""
    rows, out = rows_of(WIDE), dict(weights)
    out["in_proj.weight"] = weights["in_proj.weight"].clone()
    for name in ("B", "C"):
        block = weights["in_proj.weight"][rows[name]]
        out["in_proj.weight"][rows[name]] = block.unflatten(0, (-1, 8))[:, order].flatten(0, 1)
        out[f"{name}_norm.weight"], out[f"{name}_bias"] = (
            weights[f"{name}_norm.weight"][order],
            weights[f"{name}_bias"][..., order],
        )
    return out


def test_siso_is_not_mimo_of_rank_one():
    """SISO turns neighbours, MIMO the channels i and i + N / 2: the same weights are another layer, unless channels
    change places."""
    siso, x = make_layer(WIDE), make_input(2, TIME)
    ones = dict.fromkeys(("mimo_x", "mimo_z", "mimo_o"), torch.ones(4, 1, 4, dtype=torch.float64))
    spec = replace(WIDE, mimo_rank=1)
    want = forward(siso, x)
    same_weights = forward(make_layer(spec, **weights_of(siso), **ones), x)
    assert relative_error(same_weights, want) > 1e-2
    order = torch.tensor(
        [0, 2, 4, 5, 1, 3, 6, 7]
    )  # two angles: the pairs (0, 1) and (2, 3) come to stand at (0, 4) and (1, 5)
    assert relative_error(forward(make_layer(spec, **permuted(weights_of(siso), order), **ones), x), want) < 1e-12


@pytest.mark.parametrize("spec", [MAMBA3, MIMO], ids=["siso", "mimo"])
def test_a_whole_turn_of_every_step_is_no_turn(spec):
    """dt is two and tanh(angle) is one, so every token turns by 2 pi: the output is that without rotation."""
    layer, x = make_layer(spec), make_input(2, TIME)
    x[..., 0] = 1.0
    weights = weights_of(layer)
    start = sum(layer.row_blocks[:4])
    weights["in_proj.weight"][start : start + 4] = 0.0
    weights["dt_bias"] = torch.full(
        (4,), math.log(math.expm1(2.0)), dtype=torch.float64
    )  # dt is two: pi tanh(angle) dt is 2 pi
    weights["in_proj.weight"][-1] = torch.zeros(8)
    weights["in_proj.weight"][-1, 0] = 1e3
    still = weights | {"in_proj.weight": weights["in_proj.weight"][:-1]}
    assert (
        relative_error(
            forward(make_layer(spec, **weights), x), forward(make_layer(replace(spec, complex_rope=False), **still), x)
        )
        < 1e-11
    )


# Decoding.


@pytest.mark.parametrize(
    ("spec", "time"), [(replace(MAMBA3, chunk=64), 2000), (replace(MIMO, chunk=16), 400)], ids=["siso", "mimo"]
)
def test_thousands_of_decoded_tokens_keep_the_angle_within_a_turn(spec, time):
    """In float32: after every token, and at the end what float64 has at once; all tokens turn the same way, far over a
    turn."""
    layer, x = make_layer(spec), make_input(1, time)
    with torch.no_grad():
        layer.in_proj.weight[-1] = 0.0
        layer.in_proj.weight[-1, 0] = 1.0
        x[..., 0] = x[..., 0].abs()
        _, want = forward_in_pieces(layer, x, [], time)
        layer, narrow = layer.float(), x.float()
        cache = layer.new_cache(1, time, dtype=torch.float32, device=CPU)
        turn = torch.tensor(2 * math.pi)  # rounded to float32
        for t in range(time):
            layer(narrow[:, t : t + 1], SequenceInfo.contiguous(1, 1, t, CPU), cache)
            assert bool(((cache["angle"] >= 0) & (cache["angle"] <= turn)).all()), t
    states_agree({"angle": cache["angle"]}, {"angle": want.tensors()["angle"]}, 1e-3)
    assert relative_error(cache["ssm"], want.tensors()["ssm"]) < 1e-2


@both_kinds
def test_gradients_flow_through_the_cache(spec):
    """Prefill, single tokens and another piece with autograd recording: the states that are replaced are those the
    backward needs."""
    results, x = [], make_input(2, 9).requires_grad_()
    weights = make_input(2, 9, seed=3)
    for cuts in ([], [4, 5, 6]):
        layer = make_layer(replace(spec, use_conv=True, outproj_norm=True))
        leaves = {"x": x, **dict(layer.named_parameters())}
        cache, outputs = layer.new_cache(2, 9, dtype=torch.float64, device=CPU), []
        for start, end in zip([0, *cuts], [*cuts, 9], strict=True):
            outputs.append(layer(x[:, start:end], SequenceInfo.contiguous(2, end - start, start, CPU), cache))
        grads = torch.autograd.grad((torch.cat(outputs, 1) * weights).sum(), list(leaves.values()))
        results.append(dict(zip(leaves, grads, strict=True)))
    assert_near(results[1], results[0], 1e-10)


@both_kinds
def test_a_decoded_token_writes_its_state_in_place(spec):
    """No tensor of the state's size is put in the cache for each token."""
    layer = make_layer(spec)
    cache = layer.new_cache(1, 9, dtype=torch.float64, device=CPU)
    with torch.no_grad():
        layer(make_input(1, 4), SequenceInfo.contiguous(1, 4, 0, CPU), cache)
        before = {name: tensor.data_ptr() for name, tensor in cache.tensors().items()}
        for t in range(4, 7):
            layer(make_input(1, 1, seed=t), SequenceInfo.contiguous(1, 1, t, CPU), cache)
    assert {name: tensor.data_ptr() for name, tensor in cache.tensors().items()} == before
