"""Our operators through packages that stand in for the real ones, with the real parameters and checks: the right call,
the same numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_packages import WORKING, calls, packages

from hybridlm.cli.compose import compose_config
from hybridlm.model.build import fresh_model
from hybridlm.ops.conv import causal_conv
from hybridlm.ops.kernels import trials
from hybridlm.ops.kernels.choice import ALL_TORCH, CUDA, KernelChoice
from hybridlm.ops.ssd import ssd

HERE = torch.device("cpu")
SEPARATE = KernelChoice(conv=CUDA, mamba1=CUDA, mamba2=CUDA, mamba3_siso=CUDA, mamba3_mimo=CUDA, loss=CUDA)
IN_ONE = replace(SEPARATE, mamba2_layer=CUDA)
FP32, BF16 = torch.float32, torch.bfloat16
SMALL = [
    "size=tiny",
    "model.d_model=32",
    "model.mamba3.head_dim=16",
    "model.mamba3.d_state=16",
    "model.mamba2.head_dim=16",
]
MIMO = [
    "model.mamba3.mimo_rank=4",
    "model.mamba3.head_dim=32",
    "model.mamba3.d_state=32",
]  # the narrowest that its kernel takes


@pytest.fixture(autouse=True)
def working():
    with packages(*WORKING):
        yield


@pytest.fixture
def tf32():
    """Products of float32 may be rounded, so that the Triton kernels are let take them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("trial", "called"),
    [
        (lambda: trials.conv(HERE, FP32, documents=True), "causal_conv1d_fn"),
        (lambda: trials.conv(HERE, FP32, documents=False, state=True), "causal_conv1d_fn"),
        (lambda: trials.conv(HERE, FP32, replace(trials.SMALL, width=2), documents=True), "causal_conv1d_fn"),
        (lambda: trials.mamba1(HERE, FP32), "selective_scan_fn"),
        (lambda: trials.mamba2(HERE, FP32), "mamba_chunk_scan_combined"),
        (lambda: trials.mamba2(HERE, FP32, documents=False, state=False), "mamba_chunk_scan_combined"),
        (lambda: trials.mamba2(HERE, FP32, replace(trials.SMALL, groups=2)), "mamba_chunk_scan_combined"),
        (lambda: trials.mamba2_layer(HERE, FP32, replace(trials.SMALL, groups=2)), "mamba_split_conv1d_scan_combined"),
        (lambda: trials.loss(HERE, FP32), "LigerFusedLinearCrossEntropyFunction"),
        (lambda: trials.loss(HERE, FP32, softcap=3.0), "LigerFusedLinearCrossEntropyFunction"),
    ],
)
def test_the_same_numbers_in_float32(trial, called, tf32):
    assert trial() < 1e-5
    assert calls() == [called]


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("trial", "called"), [(trials.siso, "mamba3_siso_combined"), (trials.mimo, "mamba3_mimo")])
def test_mamba3_within_bfloat16(trial, called, documents):
    assert trial(HERE, BF16, documents=documents) < 0.02
    assert calls() == [called]


def model_of(pattern: str, *settings: str):
    config = compose_config([*SMALL, f"model.pattern={pattern}", "model.n_layers=null", *settings]).model
    return fresh_model(config, 97, seed=0, device="cpu")


def losses(model, kernels, documents, *, padded=False):
    """(loss, gradients) under bfloat16 autocast."""
    model.kernels = kernels
    ids = torch.arange(64).view(2, 32) * 7 % 97
    arguments = {"doc_ids": (torch.arange(32) // 10).expand(2, 32)} if documents else {}
    if padded:
        arguments["valid"] = torch.arange(32).expand(2, 32) > 3
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, targets=ids.roll(-1, 1), **arguments).loss_sum
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return loss.detach(), torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


@pytest.mark.parametrize(
    ("pattern", "settings", "kernels", "documents", "called"),
    [
        ("M1", [], SEPARATE, False, {"causal_conv1d_fn", "selective_scan_fn"}),
        ("M1", [], SEPARATE, True, {"causal_conv1d_fn"}),  # its scan cannot tell documents apart
        ("M2", [], SEPARATE, True, {"causal_conv1d_fn", "mamba_chunk_scan_combined"}),
        ("M2", ["model.mamba2.dt_limit=[0.01,0.05]"], IN_ONE, True, {"mamba_split_conv1d_scan_combined"}),
        (
            "M2",
            ["model.mamba2.norm_before_gate=true", "model.mamba2.n_groups=2"],
            IN_ONE,
            False,
            {"mamba_split_conv1d_scan_combined"},
        ),
        ("M3", [], SEPARATE, True, {"mamba3_siso_combined"}),
        ("M3", ["model.mamba3.use_conv=true"], SEPARATE, False, {"causal_conv1d_fn", "mamba3_siso_combined"}),
        (
            "M3",
            ["model.mamba3.outproj_norm=true", "model.mamba3.n_groups=2"],
            SEPARATE,
            False,
            {"mamba3_siso_combined"},
        ),
        (
            "M3",
            ["model.mamba3.a_activation=heavy_tail", "model.mamba3.rope_fraction=1.0"],
            SEPARATE,
            True,
            {"mamba3_siso_combined"},
        ),
        ("M3", MIMO, SEPARATE, False, {"mamba3_mimo"}),
        ("M3", [*MIMO, "model.mamba3.rope_fraction=1.0"], SEPARATE, True, {"mamba3_mimo"}),
        ("M3", ["model.mamba3.trapezoidal=false"], SEPARATE, False, set()),
        ("M3", ["model.mamba3.complex_rope=false"], SEPARATE, False, set()),
    ],
)
def test_a_model_trains_the_same(pattern, settings, kernels, documents, called):
    model = model_of(pattern, *settings)
    mine, gradients = losses(model, ALL_TORCH, documents)
    assert calls() == []
    theirs, other = losses(model, kernels, documents)
    assert set(calls()) == called | {"LigerFusedLinearCrossEntropyFunction"}
    torch.testing.assert_close(theirs, mine, rtol=2e-3, atol=0)
    assert torch.nn.functional.cosine_similarity(gradients, other, dim=0) > 0.999
    assert (gradients - other).norm() < 0.05 * gradients.norm()


def test_padding_and_decode_stay_with_our_operators():
    model = model_of("M1 M2 M3")
    losses(model, IN_ONE, False, padded=True)
    assert set(calls()) == {"selective_scan_fn", "mamba_chunk_scan_combined", "LigerFusedLinearCrossEntropyFunction"}
    with torch.no_grad():
        cache = model.new_cache(1, 8)
        ids = torch.tensor([[5, 6, 7]])
        for token in ids.unbind(1):
            model(token.unsqueeze(1), cache=cache)
    assert calls() == []


def test_a_prefill_goes_on_from_its_state(tf32):
    model = model_of("M2")
    ids = torch.arange(40).view(2, 20) % 97
    logits = []
    for kernels in (ALL_TORCH, IN_ONE):
        model.kernels = kernels
        with torch.no_grad():
            cache = model.new_cache(2, 20)
            model(ids[:, :9], cache=cache)
            logits.append(model(ids[:, 9:], cache=cache).logits)
    assert sorted(calls()) == ["causal_conv1d_fn"] * 2 + ["mamba_chunk_scan_combined"] * 2
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


def test_float64_stays_with_our_operators():
    model = model_of("M1 M2").double()
    losses_of = []
    for kernels in (ALL_TORCH, IN_ONE):
        model.kernels = kernels
        ids = torch.arange(32).view(2, 16)
        losses_of.append(model(ids, targets=ids).loss_sum)
    assert calls() == []
    assert torch.equal(*losses_of)


def test_float32_is_not_rounded_to_tf32():
    draw = trials.Draw(HERE)
    x, dt = draw(1, 8, 2, 16), draw(1, 8, 2, make=torch.nn.functional.softplus)
    B = draw(1, 8, 1, 16)
    ssd(x, dt, -torch.ones(2), B, B, torch.ones(2), backend=CUDA)
    assert calls() == []


def test_a_convolution_of_odd_layout_is_copied_first():
    """A slice of a wider projection whose rows do not begin at multiples of 8 numbers."""
    wide = torch.randn(2, 12, 37)
    x = wide[..., 3:35]
    weight, bias = torch.randn(32, 1, 4), torch.randn(32)
    mine, state = causal_conv(x, weight, bias)
    theirs, other = causal_conv(x, weight, bias, backend=CUDA)
    assert calls() == ["causal_conv1d_fn"]
    torch.testing.assert_close(theirs, mine)
    assert torch.equal(state, other)
    mine, _ = causal_conv(x, weight, bias, state)
    theirs, _ = causal_conv(x, weight, bias, other, backend=CUDA)  # the state is a view of the slice
    torch.testing.assert_close(theirs, mine)
