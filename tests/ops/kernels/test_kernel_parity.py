"""The real kernels on a real card, against our torch operators: outputs and gradients, with and without documents, at a
kernel's known precision. `make gpu-check` runs these; the largest difference is relative to the largest number of its
kind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hybridlm.cli.compose import compose_config
from hybridlm.config.kernels import KernelsConfig
from hybridlm.machine.device import CUDA, device_facts
from hybridlm.machine.kernels import KernelWork, chosen, verdicts
from hybridlm.model.build import fresh_model
from hybridlm.ops.kernels import rules, trials
from hybridlm.ops.kernels.choice import ALL_TORCH
from hybridlm.ops.kernels.probe import BF16, KERNELS, probe
from hybridlm.ops.kernels.rules import Sizes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
LARGE = Sizes(batch=2, time=600, channels=256, heads=8, head_dim=64, groups=1, d_state=128, angles=32)
FP32, TF32 = 1e-4, 5e-3  # of products whose factors are rounded to 10 bits
PRECISIONS = {torch.float32: TF32, torch.bfloat16: BF16, torch.float16: BF16}


@pytest.fixture
def device():
    return torch.device(CUDA)


@pytest.fixture(autouse=True)
def tf32():
    """Triton rounds float32 products to TF32, and is let take them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def needs(name: str, dtype: torch.dtype = torch.bfloat16) -> None:
    found = probe(name, torch.device(CUDA), dtype)
    if found.version is None and KERNELS[name].package is not None:
        pytest.skip(found.reason)
    assert found.ok, found.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize(("documents", "state"), [(False, False), (True, False), (False, True)])
def test_convolution(device, dtype, width, documents, state):
    needs("causal-conv1d")
    limit = FP32 if dtype == torch.float32 else BF16
    assert trials.conv(device, dtype, replace(LARGE, width=width), documents=documents, state=state) < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selective_scan(device, dtype):
    """Its scan is in float32 whatever the activations."""
    needs("selective scan")
    assert trials.mamba1(device, dtype, replace(LARGE, d_state=16)) < (1e-3 if dtype == torch.float32 else BF16)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize(("documents", "state"), [(False, False), (True, False), (False, True), (True, True)])
def test_ssd(device, dtype, documents, state):
    needs("SSD scan")
    assert trials.mamba2(device, dtype, LARGE, documents=documents, state=state) < PRECISIONS[dtype]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("documents", [False, True])
def test_mamba2_layer(device, groups, documents):
    needs("Mamba-2 layer")
    assert trials.mamba2_layer(device, torch.bfloat16, replace(LARGE, groups=groups), documents=documents) < BF16


@pytest.mark.parametrize("documents", [False, True])
def test_siso(device, documents):
    needs("Mamba-3 SISO")
    assert trials.siso(device, torch.bfloat16, LARGE, documents=documents) < 2 * BF16


@pytest.mark.parametrize("documents", [False, True])
def test_mimo(device, documents):
    shared = device_facts().shared_memory_kb
    refusal = rules.mimo_refusal(128, 64, 4, 32, heads=2, groups=1, gated=True, length=640, shared_memory_kb=shared)
    if refusal is not None:
        pytest.skip(refusal)
    needs("Mamba-3 MIMO")
    assert trials.mimo(device, torch.bfloat16, replace(LARGE, time=640), documents=documents) < 2 * BF16


@pytest.mark.parametrize("softcap", [None, 15.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss(device, dtype, softcap):
    needs("linear cross-entropy")
    assert trials.loss(device, dtype, rows=2048, vocab=32_000, softcap=softcap) < PRECISIONS[dtype]


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("pattern", ["M1", "M2", "M3", "M2 M2 T M3 M1"])
def test_a_model_trains_the_same(device, pattern, documents):
    """Loss and gradients of a small model under bfloat16, with every kernel that works and with none."""
    config = compose_config(
        [
            f"model.pattern={pattern}",
            "model.n_layers=null",
            "model.d_model=256",
            "model.attention.n_heads=4",
            "model.mamba3.d_state=64",
        ]
    ).model
    work = KernelWork(config.layers, torch.bfloat16, documents, 1.0)
    found = verdicts(work, KernelsConfig(), device_facts(), device)
    kernels = chosen(found, work.dtype, device)
    if kernels == ALL_TORCH:
        pytest.skip("no kernel works here")
    model = fresh_model(config, 997, seed=0, device="cpu").to(device)
    ids = (torch.arange(2 * 512, device=device) * 7 % 997).view(2, 512)
    doc_ids = (torch.arange(512, device=device) // 100).expand(2, 512) if documents else None
    results = []
    for choice in (ALL_TORCH, kernels):
        model.kernels = choice
        with torch.autocast(CUDA, torch.bfloat16):
            loss = model(ids, doc_ids=doc_ids, targets=ids.roll(-1, 1)).loss_sum
        grads = torch.autograd.grad(loss, list(model.parameters()))
        results.append((loss.detach(), torch.cat([grad.flatten().float() for grad in grads])))
    (mine, gradient), (theirs, other) = results
    torch.testing.assert_close(theirs, mine, rtol=2e-3, atol=0)
    assert (gradient - other).norm() < 0.05 * gradient.norm()


@pytest.mark.parametrize("name", KERNELS)
def test_what_is_installed_works(name, device):
    needs(name, torch.bfloat16 if device_facts().bf16 else torch.float16)
