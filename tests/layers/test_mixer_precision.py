"""Mixed precision: states and statistics stay wide, and gradients stay finite, under bfloat16 and float16."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from mixer_specs import MAMBA1, MAMBA2, MAMBA3, every_mixer, forward, forward_in_pieces, make_input, make_mixer
from recurrences import relative_error

from hybridlm.config.ffns.mlp import MLPSpec
from hybridlm.layers.mlp import MLP
from hybridlm.layers.sequence import SequenceInfo
from hybridlm.model.block import Block

TIME = 17
LARGEST_GRADIENT = 2.0**8  # of the scaled loss, in float32; float16 ends at 2**16
narrow_dtypes = pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)], ids=["bf16", "fp16"]
)


@every_mixer
@narrow_dtypes
def test_autocast_keeps_outputs_and_states_sound(spec, dtype, rounding):
    mixer, x = make_mixer(spec, torch.float32), make_input(2, TIME, torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        y = forward(mixer, x)
        pieces, cache = forward_in_pieces(mixer, x, [6, 7, 8, 12], TIME)
    assert y.dtype == dtype
    want = forward(make_mixer(spec), x.double())
    for got in (
        y,
        pieces,
    ):  # over all entries: a norm over a few channels that nearly cancel magnifies single roundings
        assert float((got - want).detach().norm() / want.detach().norm()) < rounding
    assert all(tensor.dtype == torch.float32 for tensor in cache.tensors().values())


@every_mixer
@narrow_dtypes
def test_autocast_keeps_gradients_of_a_block_sound(spec, dtype, rounding):
    """With the loss scaled as float16 needs it; over all entries of each gradient, against those of float32."""
    mlp = MLP(MLPSpec(8, 12, "swiglu"))
    block = Block(make_mixer(spec, torch.float32), mlp, 8, eps=1e-5, residual_scale=1.0)
    with torch.no_grad():
        for i, parameter in enumerate(mlp.parameters()):
            parameter.copy_(
                make_input(1, parameter.numel() // 8, torch.float32, seed=20 + i).reshape(parameter.shape) * 0.35
            )
        for norm in (block.mixer_norm, block.ffn_norm):
            assert norm is not None
            norm.weight.copy_(make_input(1, 1, torch.float32, seed=30)[0, 0])
    x, seq = (
        make_input(2, TIME, torch.float32).requires_grad_(),
        SequenceInfo.contiguous(2, TIME, 0, torch.device("cpu")),
    )
    leaves = {"x": x, **dict(block.named_parameters())}

    def gradients(scale: float, autocast: bool) -> list[torch.Tensor]:
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            y, _ = block(x, seq)
        return list(torch.autograd.grad(y.float().square().mean() * scale, list(leaves.values())))

    scale = 2.0 ** math.floor(
        math.log2(LARGEST_GRADIENT / max(float(grad.abs().max()) for grad in gradients(1.0, autocast=False)))
    )
    exact = gradients(scale, autocast=False)
    whole = torch.cat([grad.flatten() for grad in exact]).norm()
    for name, got, want in zip(leaves, gradients(scale, autocast=True), exact, strict=True):
        assert got.dtype == torch.float32
        assert bool(got.isfinite().all()), name
        assert float((got - want).norm()) < 3 * rounding * float(want.norm() + 0.02 * whole), name


@pytest.mark.parametrize("spec", [MAMBA1, MAMBA2, replace(MAMBA3, use_conv=True)], ids=["mamba1", "mamba2", "mamba3"])
def test_states_stay_wide_with_bfloat16_activations(spec):
    mixer = make_mixer(spec, torch.bfloat16)
    x = make_input(2, TIME, torch.bfloat16)
    pieces, cache = forward_in_pieces(mixer, x, [6, 7, 8], TIME)
    assert pieces.dtype == torch.bfloat16
    assert {name: tensor.dtype for name, tensor in cache.tensors().items()} == {
        name: torch.bfloat16 if name == "conv" else torch.float32 for name in cache.tensors()
    }
    assert relative_error(pieces, forward(mixer, x)) < 3e-2
