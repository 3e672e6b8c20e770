"""What is Mamba-1's own: its parameters' order, names, start values and precision, documents and padding through the
whole layer."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from recurrences import assert_near, relative_error
from torch import Tensor

from hybridlm.config.mixers.mamba1 import Mamba1Spec
from hybridlm.layers.init import Init
from hybridlm.layers.mamba1 import Mamba1
from hybridlm.layers.sequence import SequenceInfo

CPU = torch.device("cpu")
INIT = Init(std=None, residual="depth", n_layers=3)
SPEC = Mamba1Spec(d_model=8, d_inner=12, d_state=5, d_conv=4, dt_rank=2, bias=False, chunk=4, dt_range=(1e-3, 1e-1))
BIAS = replace(SPEC, bias=True, dt_rank=1, d_conv=2)


def make_layer(spec: Mamba1Spec = SPEC, dtype: torch.dtype = torch.float64) -> Mamba1:
    """Weights that hide nothing: no bias zero, no channel like another."""
    layer, g = Mamba1(spec), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            values = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
            parameter.copy_(values * parameter.shape[1] ** -0.5 if name.endswith("proj.weight") else values)
    return layer.to(dtype)


def make_input(batch: int, time: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, time, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def forward(layer: Mamba1, x: Tensor) -> Tensor:
    return layer(x, SequenceInfo.contiguous(*x.shape[:2], 0, CPU))


def by_hand(p: dict[str, Tensor], u: Tensor, spec: Mamba1Spec) -> Tensor:
    """The layer's equations token by token, from zeros."""
    nothing = torch.zeros((), dtype=u.dtype)
    window = [u.new_zeros(len(u), spec.d_inner)] * spec.d_conv
    state, outputs = u.new_zeros(len(u), spec.d_inner, spec.d_state), []
    for t in range(u.shape[1]):
        x, z = (u[:, t] @ p["in_proj.weight"].T + p.get("in_proj.bias", nothing)).chunk(2, -1)  # x first
        window = [*window[1:], x]
        c = p["conv1d.bias"] + sum(p["conv1d.weight"][:, 0, k] * past for k, past in enumerate(window))
        c = c * torch.sigmoid(c)
        delta, B, C = torch.split(c @ p["x_proj.weight"].T, [spec.dt_rank, spec.d_state, spec.d_state], -1)
        dt = torch.log1p(torch.exp(delta @ p["dt_proj.weight"].T + p["dt_proj.bias"]))
        state = torch.exp(-dt[:, :, None] * torch.exp(p["A_log"])) * state + (dt * c)[:, :, None] * B[:, None]
        y = (state * C[:, None]).sum(-1) + p["D"] * c
        outputs.append((y * z * torch.sigmoid(z)) @ p["out_proj.weight"].T + p.get("out_proj.bias", nothing))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("spec", [SPEC, BIAS], ids=["plain", "bias"])
def test_output_and_every_gradient_are_the_equations(spec):
    layer, x = make_layer(spec), make_input(2, 11).requires_grad_()
    parameters = dict(layer.named_parameters())
    leaves, weights, results = {"x": x, **parameters}, make_input(2, 11, seed=2), []
    for y in (forward(layer, x), by_hand(parameters, x, spec)):
        grads = torch.autograd.grad((y * weights).sum(), list(leaves.values()))
        results.append({"y": y} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)})
    assert_near(*results, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_prefill_and_decode_are_the_whole(dtype):
    layer, x = make_layer(dtype=dtype), make_input(2, 11).to(dtype)
    cache, pieces = layer.new_cache(2, 11, dtype=dtype, device=CPU), []
    with torch.no_grad():
        for start, end in ((0, 5), (5, 7), (7, 8), (8, 9), (9, 10), (10, 11)):
            pieces.append(layer(x[:, start:end], SequenceInfo.contiguous(2, end - start, start, CPU), cache))
    assert relative_error(torch.cat(pieces, 1), forward(layer, x)) < (1e-12 if dtype == torch.float64 else 1e-5)


# Documents and padding.


def documents(starts: Tensor) -> SequenceInfo:
    """The tokens of a forward, a document at every ``starts`` (B, T) and at the first column."""
    columns = torch.arange(starts.shape[1])
    first = torch.where(starts, columns, 0).cummax(1).values
    return SequenceInfo(columns - first, starts=starts, doc_ids=starts.long().cumsum(1))


def test_documents_in_one_row_are_the_documents_alone():
    """At every place of a chunk, gradients too: nothing crosses through the convolution or the state."""
    layer, x, weights = make_layer(), make_input(1, 13), make_input(1, 13, seed=2)
    parameters = list(layer.parameters())
    for cut in range(1, 13):
        starts = torch.zeros(1, 13, dtype=torch.bool)
        starts[:, cut] = True
        joined = layer(x, documents(starts))
        alone = torch.cat([forward(layer, x[:, :cut]), forward(layer, x[:, cut:])], 1)
        assert relative_error(joined, alone) < 1e-12, cut
        grads = [torch.autograd.grad((y * weights).sum(), parameters) for y in (joined, alone)]
        for got, want in zip(*grads, strict=True):
            assert relative_error(got, want) < 1e-10, cut


def test_a_document_that_starts_while_decoding_forgets_the_cache():
    layer, x = make_layer(), make_input(2, 9)
    cache = layer.new_cache(2, 9, dtype=torch.float64, device=CPU)
    with torch.no_grad():
        layer(x[:, :5], SequenceInfo.contiguous(2, 5, 0, CPU), cache)
        line = []
        for t in range(5, 9):
            starts = torch.full((2, 1), t == 5)
            seq = SequenceInfo(
                torch.full((2, 1), t - 5), past=t, starts=starts, doc_ids=torch.ones(2, 1, dtype=torch.long)
            )
            line.append(layer(x[:, t : t + 1], seq, cache))
    assert relative_error(torch.cat(line, 1), forward(layer, x[:, 5:])) < 1e-12


def left_padded(batch: int, columns: int, padding: list[int], past: int = 0) -> SequenceInfo:
    valid = torch.arange(columns) >= torch.tensor(padding).unsqueeze(1)
    positions = (torch.arange(columns) - torch.tensor(padding).unsqueeze(1)).clamp_min(0) + past
    return SequenceInfo(positions.expand(batch, columns), past=past, valid=valid, held=torch.full((batch,), past))


@pytest.mark.parametrize("past", [0, 4])
def test_padding_is_not_there(past):
    """Rows of different lengths after a past: outputs, states and what follows are those of each row alone; a row of
    padding only keeps its states bit for bit."""
    layer, x, padding = make_layer(), make_input(3, 4 + 6), [0, 2, 6]
    x[1, 4:6] = x[2, 4:] = 1e3  # what stands at padding does not matter
    cache = layer.new_cache(3, 20, dtype=torch.float64, device=CPU)
    with torch.no_grad():
        if past:
            layer(x[:, :4], SequenceInfo.contiguous(3, 4, 0, CPU), cache)
        before = {name: tensor.clone() for name, tensor in cache.tensors().items()}
        y = layer(x[:, 4:], left_padded(3, 6, padding, past), cache)
        assert bool(y.isfinite().all())
        for name, tensor in cache.tensors().items():
            assert torch.equal(tensor[2], before[name][2]), name
        for row, skipped in enumerate(padding[:2]):
            own = layer.new_cache(1, 20, dtype=torch.float64, device=CPU)
            text = torch.cat([x[row : row + 1, 4 - past : 4], x[row : row + 1, 4 + skipped :]], 1)
            alone = layer(text, SequenceInfo.contiguous(1, text.shape[1], 0, CPU), own)
            assert relative_error(y[row : row + 1, skipped:], alone[:, past:]) < 1e-12
            for name, tensor in own.tensors().items():
                assert relative_error(cache[name][row : row + 1], tensor) < 1e-12, name


def test_padding_gives_no_gradient():
    layer, x = make_layer(), make_input(2, 6).requires_grad_()
    y = layer(x, left_padded(2, 6, [0, 3]))
    (y[0].sum() + y[1, 3:].sum()).backward()
    assert float(x.grad[1, :3].abs().max()) == 0
    assert float(x.grad[1, 3:].abs().min()) > 0


# Precision.


def test_step_sizes_stay_float32_under_autocast():
    """Rounding dt to bfloat16 would move a slow channel's memory by per cents over a few hundred tokens."""
    layer = make_layer(dtype=torch.float32)
    delta = make_input(2, 5)[..., :2].bfloat16()
    want = F.softplus(delta.float() @ layer.dt_proj.weight.T + layer.dt_proj.bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dt = layer._step_sizes(delta, None)
    assert dt.dtype == torch.float32
    assert torch.equal(dt, want)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_state_wide(half):
    layer, x = make_layer(dtype=torch.float32), make_input(2, 11).float()
    cache = layer.new_cache(2, 11, dtype=half, device=CPU)
    with torch.autocast("cpu", dtype=half):
        y = forward(layer, x)
        layer(x, SequenceInfo.contiguous(2, 11, 0, CPU), cache)
    assert (y.dtype, cache["conv"].dtype, cache["ssm"].dtype) == (half, half, torch.float32)
    want = forward(make_layer(), x.double())
    assert float((y.double() - want).detach().norm() / want.detach().norm()) < 3e-2
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and bool(p.grad.isfinite().all()) for p in layer.parameters())


# Costs and weights.


def test_state_bytes_and_flops_by_hand():
    layer = make_layer(BIAS)  # D 8, E 12, N 5, K 2, R 1
    assert layer.state_bytes(1000, 3, torch.bfloat16) == 3 * (2 * 1 * 12 + 4 * 12 * 5), "the scan's state stays float32"
    projections = 2 * (8 * 24 + 12 * (1 + 5 + 5) + 1 * 12 + 12 * 8)
    state = 2 * 12 * 5 + 2 * 12 * 5  # written and read
    for phase, passes in (("train", 3), ("prefill", 1), ("decode", 1)):
        assert layer.flops(777, phase) == passes * (projections + 2 * 2 * 12 + state)


def test_parameters_are_named_and_shaped_as_mamba_ssms():
    shapes = {name: tuple(parameter.shape) for name, parameter in make_layer(BIAS).named_parameters()}
    biases = {"in_proj.bias": (24,), "out_proj.bias": (8,)}
    assert shapes == biases | {
        "in_proj.weight": (24, 8),
        "conv1d.weight": (12, 1, 2),
        "conv1d.bias": (12,),
        "x_proj.weight": (1 + 5 + 5, 12),
        "dt_proj.weight": (12, 1),
        "dt_proj.bias": (12,),
        "A_log": (12, 5),
        "D": (12,),
        "out_proj.weight": (8, 12),
    }
    assert not biases.keys() & dict(make_layer(SPEC).named_parameters()).keys()


def test_what_the_parameters_declare():
    specs = make_layer(BIAS).param_specs()
    assert specs.keys() == dict(make_layer(BIAS).named_parameters()).keys()
    assert {name for name, spec in specs.items() if spec.dtype == "fp32"} == {"A_log", "D", "dt_proj.bias"}
    assert {name for name, spec in specs.items() if spec.decay} == {
        f"{name}_proj.weight" for name in ("in", "x", "dt", "out")
    }
    assert all(spec.role == ("matrix" if spec.decay else "vector") for spec in specs.values())
    assert specs["in_proj.weight"].row_blocks == (12, 12)  # x, z
    assert specs["x_proj.weight"].row_blocks == (1, 5, 5)  # dt, B, C


def test_weights_are_drawn_as_published():
    spec = replace(SPEC, d_model=32, d_inner=4000, dt_rank=16, bias=True, dt_range=(2e-3, 0.2))
    layer = Mamba1(spec)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(math.nan)
    torch.manual_seed(0)
    layer.reset_parameters(INIT)
    dt = F.softplus(layer.dt_proj.bias.detach().double())
    assert 2e-3 * (1 - 1e-4) <= float(dt.min()) < 2.2e-3
    assert 0.18 < float(dt.max()) <= 0.2 * (1 + 1e-4)
    assert float((dt.log().sort().values - torch.linspace(math.log(2e-3), math.log(0.2), 4000)).abs().max()) < 0.2, (
        "log-uniform"
    )
    assert torch.equal(layer.A_log.detach(), torch.arange(1, 6, dtype=torch.float64).log().float().expand(4000, 5))
    assert torch.equal(layer.D, torch.ones(4000))
    for weight, bound in (
        (layer.dt_proj.weight, 16**-0.5),
        (layer.conv1d.weight, 4**-0.5),
        (layer.conv1d.bias, 4**-0.5),
    ):
        assert 0.98 * bound < float(weight.detach().abs().max()) <= bound
        assert float(weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    for weight, std in (
        (layer.in_proj.weight, 32**-0.5),
        (layer.x_proj.weight, 4000**-0.5),
        (layer.out_proj.weight, (4000 * 6) ** -0.5),
    ):
        assert float(weight.detach().std()) == pytest.approx(std, rel=0.03)
    assert float(layer.in_proj.bias.abs().max()) == float(layer.out_proj.bias.abs().max()) == 0


def test_step_sizes_have_a_floor():
    layer = Mamba1(replace(SPEC, dt_range=(1e-7, 1e-6)))
    layer.reset_parameters(INIT)
    assert torch.allclose(F.softplus(layer.dt_proj.bias), torch.tensor(1e-4), rtol=1e-3)
