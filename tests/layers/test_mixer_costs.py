"""What a mixer says it needs: the bytes of its cache, and its FLOPs per token (a multiply-add counts two)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mixer_specs import CPU, GQA, MAMBA1, MAMBA2, MAMBA3, MLA, every_mixer, make_mixer

TIME = 17


@every_mixer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_cache_is_as_large_as_announced(spec, dtype):
    mixer = make_mixer(spec)
    for context in (1, 2, 3, 4, TIME, 100, 101):
        for batch in (1, 3):
            cache = mixer.new_cache(batch, context, dtype=dtype, device=CPU)
            assert sum(tensor.nbytes for tensor in cache.tensors().values()) == mixer.state_bytes(context, batch, dtype)


def test_attention_state_bytes_by_hand():
    keys_and_values = 2 * 2 * 6  # of one token: k and v of two heads of six
    assert make_mixer(GQA).state_bytes(100, 3, torch.float32) == 3 * 4 * 100 * keys_and_values
    window = make_mixer(replace(GQA, window=8))
    assert window.state_bytes(100, 3, torch.bfloat16) == 3 * 2 * 7 * keys_and_values, (
        "what a new token may see beside itself"
    )
    assert window.state_bytes(5, 3, torch.bfloat16) == 3 * 2 * 5 * keys_and_values


def test_latent_attention_keeps_its_latent_and_one_key():
    assert make_mixer(MLA).state_bytes(100, 3, torch.bfloat16) == 3 * 2 * 100 * (5 + 4)  # c and r, whatever the heads
    assert make_mixer(replace(MLA, n_heads=4, v_head_dim=9)).state_bytes(100, 3, torch.bfloat16) == 3 * 2 * 100 * (
        5 + 4
    )


def test_mamba_state_bytes_by_hand():
    """A convolution's columns have the activations' dtype; the scan's state stays float32."""
    conv, ssm = 3 * 16, 16 * 3  # K - 1 columns of x; E N
    assert make_mixer(MAMBA1).state_bytes(1000, 5, torch.bfloat16) == 5 * (2 * conv + 4 * ssm)
    conv, ssm = 3 * (16 + 2 * 2 * 3), 4 * 4 * 3  # K - 1 columns of [x, B, C]; H P N
    mamba = make_mixer(replace(MAMBA2, n_groups=2))
    assert mamba.state_bytes(1000, 5, torch.float32) == 5 * 4 * (conv + ssm)
    assert mamba.state_bytes(1, 5, torch.bfloat16) == 5 * (2 * conv + 4 * ssm)


def test_mamba3_state_bytes_by_hand():
    angle, ssm, k, v = 4 * 1, 4 * 4 * 6, 4 * 6, 4 * 4  # H n, H P N, R H N, H P
    assert make_mixer(MAMBA3).state_bytes(1000, 5, torch.bfloat16) == 5 * 4 * (angle + ssm + k + v)
    assert make_mixer(replace(MAMBA3, mimo_rank=3)).state_bytes(1, 5, torch.float32) == 5 * 4 * (
        angle + ssm + 3 * k + v
    )
    conv = 3 * (16 + 2 * 2 * 6)  # K - 1 columns of [x, B, C]
    with_conv = make_mixer(replace(MAMBA3, use_conv=True, n_groups=2))
    assert with_conv.state_bytes(1, 5, torch.bfloat16) == 5 * (4 * (angle + ssm + k + v) + 2 * conv)


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


def test_latent_attention_flops_by_hand():
    """At once, every key and value is written out; in decode a query meets the latent itself, as wide for keys as for
    values."""
    mixer = make_mixer(MLA)  # D 8, H 2, latent 5, per head 3 + 4 channels of queries and 6 of values
    projections = 2 * (8 * 2 * (3 + 4) + 8 * (5 + 4) + 5 * 2 * (3 + 6) + 2 * 6 * 8)
    per_key = 2 * 2 * (3 + 4 + 6)
    assert mixer.flops(5, "prefill") == projections + per_key * (1 + 2 + 3 + 4 + 5) / 5
    assert mixer.flops(100, "decode") == projections + 2 * 2 * (5 + 4 + 5) * 101


def test_mamba1_flops_by_hand():
    mixer = make_mixer(replace(MAMBA1, dt_rank=2))  # D 8, E 16, N 3, K 4
    projections = 2 * (8 * 32 + 16 * (2 + 3 + 3) + 2 * 16 + 16 * 8)
    conv, state = 2 * 4 * 16, 4 * 16 * 3  # written and read
    assert (
        mixer.flops(1000, "decode")
        == mixer.flops(1000, "prefill")
        == mixer.flops(1, "prefill")
        == projections + conv + state
    )


def test_mamba2_flops_by_hand():
    mixer = make_mixer(replace(MAMBA2, n_groups=2))  # D 8, d_inner 16, N 3, G 2, K 4, H 4, chunks of 8
    projections = 2 * 8 * (16 + 16 + 6 + 6 + 4) + 2 * 16 * 8
    conv = 2 * 4 * (16 + 6 + 6)
    state = 2 * 16 * 3 + 2 * 16 * 3  # written and read
    assert mixer.flops(1000, "decode") == projections + conv + state
    tile = 2 * 8 * 2 * 3 + 2 * 8 * 16  # scores of both groups, then values of all heads, against the chunk's 8 tokens
    assert mixer.flops(1000, "prefill") == projections + conv + state + tile
    assert mixer.flops(4, "prefill") == projections + conv + state + tile / 2


@pytest.mark.parametrize("rank", [None, 1, 3])
def test_mamba3_flops_by_hand(rank):
    """Every head has scores of its own, as its rotation is; with rank R, each of R outputs meets each of R inputs."""
    r = rank or 1
    mixer = make_mixer(
        replace(MAMBA3, mimo_rank=rank, n_groups=2)
    )  # D 8, d_inner 16, H 4, P 4, N 6, one angle, chunks of 8
    projections = 2 * 8 * (16 + 16 + 2 * r * 2 * 6 + 4 + 4 + 4 + 1) + 2 * 16 * 8
    state = r * (2 * 16 * 6 + 2 * 16 * 6)
    tile = r * r * 2 * 8 * (4 * 6 + 16)
    assert mixer.flops(1000, "prefill") == projections + state + tile
    assert mixer.flops(4, "prefill") == projections + state + tile / 2
    assert mixer.flops(1000, "decode") == projections + state


def test_mamba3_flops_of_its_ablations():
    whole = make_mixer(MAMBA3).flops(1000, "prefill")
    assert (
        whole - make_mixer(replace(MAMBA3, complex_rope=False)).flops(1000, "prefill") == 2 * 8 * 1
    )  # one angle's row of in_proj
    assert (
        whole - make_mixer(replace(MAMBA3, trapezoidal=False)).flops(1000, "prefill") == 2 * 8 * 4
    )  # a row for each head
    assert make_mixer(replace(MAMBA3, use_conv=True)).flops(1000, "prefill") - whole == 2 * 4 * (16 + 6 + 6)


@every_mixer
def test_training_is_three_prefills_and_flops_do_not_fall(spec):
    mixer = make_mixer(spec)
    assert mixer.flops(64, "train") == 3 * mixer.flops(64, "prefill")
    for phase in ("prefill", "decode"):
        costs = [mixer.flops(context, phase) for context in (1, 2, 8, 64, 1000)]
        assert costs == sorted(costs), phase
        assert costs[0] > 0
