"""What each kernel is not used for, and in which words."""

from __future__ import annotations

import pytest
import torch

from hybridlm.ops.kernels.rules import (
    conv_refusal,
    loss_refusal,
    mamba1_refusal,
    mamba2_layer_refusal,
    mamba2_refusal,
    mamba3_refusal,
    mimo_refusal,
    mimo_shared_kib,
)

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
M3 = {"d_state": 128, "head_dim": 64, "n_angles": 32, "dtype": BF16, "trapezoidal": True}
MIMO = {"d_state": 128, "head_dim": 64, "rank": 4, "n_angles": 32, "heads": 8, "groups": 1, "gated": True}
CASES = [
    (conv_refusal(64, 4, FP32), None),
    (conv_refusal(64, 2, FP16, documents=True), None),
    (conv_refusal(64, 4, BF16, state=True), None),
    (conv_refusal(60, 4, BF16), "it needs a multiple of 8 channels, not 60"),
    (conv_refusal(64, 5, BF16), "it supports a width of 2 to 4, not 5"),
    (conv_refusal(64, 1, BF16), "it supports a width of 2 to 4, not 1"),
    (conv_refusal(64, 4, FP64), "it does not support float64"),
    (conv_refusal(64, 4, BF16, padding=True), "it does not support padding"),
    (
        conv_refusal(64, 4, BF16, documents=True, state=True),
        "it cannot both continue from a state and separate documents",
    ),
    (mamba1_refusal(16, FP32), None),
    (mamba1_refusal(257, FP32), "it supports at most 256 states per channel, not 257"),
    (mamba1_refusal(16, FP32, documents=True), "it cannot separate documents (data.isolate)"),
    (mamba1_refusal(16, FP32, state=True), "it does not support an initial state"),
    (mamba1_refusal(16, FP64), "it does not support float64"),
    (mamba2_refusal(128, BF16), None),
    (mamba2_refusal(128, FP16), None),
    (mamba2_refusal(512, BF16), "it supports at most 256 states per head, not 512"),
    (mamba2_refusal(128, FP32), "it rounds float32 products to TF32 (10 bits); it is for bfloat16 and float16"),
    (mamba2_refusal(128, FP64), "it does not support float64"),
    (mamba2_layer_refusal(64, 4, 128, BF16), None),
    (mamba2_layer_refusal(64, 5, 128, BF16), "it supports a width of 2 to 4, not 5"),
    (mamba2_layer_refusal(64, 4, 128, BF16, state=True), "it does not return the convolution's state"),
    (mamba3_refusal(**M3), None),
    (mamba3_refusal(**{**M3, "dtype": FP32}), "it computes in bfloat16, not float32"),
    (mamba3_refusal(**{**M3, "dtype": FP16}), "it computes in bfloat16, not float16"),
    (mamba3_refusal(**{**M3, "d_state": 96}), "it needs a d_state that is a power of two from 16 on, not 96"),
    (mamba3_refusal(**{**M3, "head_dim": 8}), "it needs a head_dim that is a power of two from 16 on, not 8"),
    (mamba3_refusal(**{**M3, "n_angles": 0}), "it needs an even number of angles, not 0"),
    (mamba3_refusal(**{**M3, "trapezoidal": False}), "it only has the trapezoidal recurrence"),
    (mamba3_refusal(**M3, state=True), "it supports neither an initial state nor padding"),
    (mimo_refusal(**MIMO), None),
    (mimo_refusal(**MIMO, length=2048, shared_memory_kb=227), None),
    (mimo_refusal(**{**MIMO, "groups": 8}), None),
    (mimo_refusal(**{**MIMO, "groups": 2}), "its backward supports one group of B and C or one for each head, not 2"),
    (
        mimo_refusal(**{**MIMO, "head_dim": 16}),
        "it is not tested by its authors with d_state 128 and head_dim 16, or it does not compile",
    ),
    (
        mimo_refusal(**{**MIMO, "d_state": 256, "head_dim": 128}),
        "it is not tested by its authors with d_state 256 and head_dim 128, or it does not compile",
    ),
    (mimo_refusal(**MIMO, length=2040), "it needs whole chunks of 16 tokens, not 2040"),
    (mimo_refusal(**{**MIMO, "rank": 3}), "it supports a rank of 1, 2, 4 or 8, not 3"),
    (mimo_refusal(**{**MIMO, "rank": 16}), "it supports a rank of 1, 2, 4 or 8, not 16"),
    (mimo_refusal(**{**MIMO, "gated": False}), "it is not used with outproj_norm"),
    (
        mimo_refusal(**MIMO, shared_memory_kb=99),
        "its backward needs 204 KiB of shared memory per block, the card has 99",
    ),
    (loss_refusal(BF16, scale=1.0), None),
    (loss_refusal(FP16, scale=1.0), "it computes gradients before loss scaling, where float16 underflows"),
    (loss_refusal(BF16, scale=0.5), "it does not support logit_scale (0.5)"),
    (loss_refusal(BF16, scale=1.0, sharded=True), "it does not support a sharded weight"),
    (loss_refusal(FP64, scale=1.0), "it does not support float64"),
]


@pytest.mark.parametrize(("refusal", "expected"), CASES)
def test_refusal(refusal, expected):
    assert refusal == expected


def test_shared_memory_by_hand():
    """At N 128, P 64, R 4: rows 64, chunk 16; 16-bit tiles 7 x 64 x 128, 3 x 64 x 64, 2 x 128 x 64, 2 x 16 x 64, 64 x
    64, 16 x 4 x 4; 32-bit tiles 64 x 64 and 64 x 32."""
    numbers = 57_344 + 12_288 + 16_384 + 2_048 + 4_096 + 256
    assert mimo_shared_kib(128, 64, 4, 32) == (2 * numbers + 4 * (4_096 + 2_048)) / 1024
