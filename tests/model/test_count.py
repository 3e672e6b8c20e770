"""Parameters, FLOPs and state bytes against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from small_models import VOCAB, make_ids, small_config, small_model

from hybridlm.config.mixers.attention import AttentionConfig
from hybridlm.model.build import build_model
from hybridlm.model.count import flops_per_token, layer_table, parameters, state_bytes

# d_model 8. Attention: two query heads and one key head of 4. Mamba-2: d_inner 16, four heads of 4, two groups of 3, K
# 4, chunk 5. d_ff 12.
ATTENTION = 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8
IN_PROJ, CONV_CHANNELS = 16 + 16 + 6 + 6 + 4, 16 + 6 + 6
MAMBA2 = 8 * IN_PROJ + 4 * CONV_CHANNELS + CONV_CHANNELS + 4 + 4 + 4 + 16 + 16 * 8
MLP = 3 * 8 * 12
NORM = 8
EMBEDDING = 16 * 8  # 13 ids, padded


@pytest.mark.parametrize(
    ("pattern", "blocks"),
    [
        ("T", ATTENTION + MLP + 2 * NORM),
        ("T:none", ATTENTION + NORM),
        ("M", MAMBA2 + NORM),
        ("M:mlp", MAMBA2 + MLP + 2 * NORM),
        ("MTM", 2 * (MAMBA2 + NORM) + ATTENTION + MLP + 2 * NORM),
    ],
)
def test_parameters(pattern, blocks):
    """A tied head is counted once."""
    assert parameters(build_model(small_config(pattern), VOCAB)) == EMBEDDING + blocks + NORM
    assert parameters(build_model(small_config(pattern, tie_embeddings=False), VOCAB)) == 2 * EMBEDDING + blocks + NORM


def test_parameters_of_the_options():
    qk_norm = build_model(
        small_config("T:none", attention=AttentionConfig(n_heads=2, n_kv_heads=1, qk_norm=True)), VOCAB
    )
    assert parameters(qk_norm) == EMBEDDING + ATTENTION + 4 + 4 + 2 * NORM


@pytest.mark.parametrize("tied", [True, False])
def test_flops_per_token(tied):
    model = build_model(small_config("MT", tie_embeddings=tied), VOCAB)
    mamba = 2 * (8 * IN_PROJ + 16 * 8) + 2 * 4 * CONV_CHANNELS + 2 * 2 * 16 * 3
    tile = 2 * 5 * (2 * 3 + 16)
    attention, mlp, head = (
        2 * ATTENTION,
        2 * MLP,
        2 * EMBEDDING,
    )  # the head multiplies, tied or not; the embedding only looks up
    keys = (1 + 2 + 3 + 4 + 5 + 6 + 7 + 8 + 9 + 10) / 10
    prefill = mamba + tile + attention + 2 * 2 * 8 * keys + mlp + head
    assert flops_per_token(model, 10, "prefill") == pytest.approx(prefill, rel=1e-12)
    assert flops_per_token(model, 10, "train") == pytest.approx(3 * prefill, rel=1e-12)
    decode = flops_per_token(model, 10, "decode") - flops_per_token(model, 9, "decode")
    assert decode == 2 * 2 * 8, "one key more"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 4])
def test_state_bytes_are_what_a_cache_allocates(window, dtype):
    config = small_config("MTM", attention=AttentionConfig(n_heads=2, n_kv_heads=1, window=window))
    model = small_model(config, torch.float32)
    for context in (1, 3, 4, 5, 30):
        for batch in (1, 2):
            assert state_bytes(model, context, batch, dtype) == model.new_cache(batch, context, dtype).bytes


def test_state_bytes_by_hand():
    model = build_model(small_config("MTM"), VOCAB)
    size = {torch.float32: 4, torch.bfloat16: 2}
    for dtype, width in size.items():
        mamba = 3 * CONV_CHANNELS * width + 4 * 4 * 3 * 4
        assert state_bytes(model, 30, 2, dtype) == 2 * (2 * mamba + 2 * 30 * 4 * width)


def test_the_cache_is_in_the_weights_dtype_unless_told():
    model = small_model(small_config("T"), torch.bfloat16)
    assert model.new_cache(1, 4).layers[0].tensors()["k"].dtype == torch.bfloat16
    assert model.new_cache(1, 4, torch.float32).layers[0].tensors()["k"].dtype == torch.float32


def test_a_forward_does_not_outgrow_its_state():
    """The bytes after the text are those announced before it."""
    model = small_model(small_config("MT"), torch.float32)
    cache = model.new_cache(2, 12)
    with torch.no_grad():
        model(make_ids(2, 12), cache=cache)
    assert cache.bytes == state_bytes(model, 12, 2)


def test_layer_table():
    lines = layer_table(build_model(small_config("MT M:mlp"), VOCAB), 1000).splitlines()
    mamba_bytes = 4 * (3 * CONV_CHANNELS + 4 * 4 * 3)
    rows = [line.split() for line in lines]
    assert rows[0] == ["layer", "mixer", "ffn", "parameters", "state", "at", "1000"]
    assert rows[1] == ["0", "mamba2", "none", str(MAMBA2 + NORM), str(mamba_bytes), "B"]
    assert rows[2] == [
        "1",
        "attention",
        "mlp",
        str(ATTENTION + MLP + 2 * NORM),
        "31.2",
        "KiB",
    ]  # 2 x 1000 x 4 numbers of 4 bytes
    assert rows[3] == ["2", "mamba2", "mlp", str(MAMBA2 + MLP + 2 * NORM), str(mamba_bytes), "B"]
    assert "tied" in lines[4]
    assert "13 ids" in lines[4]
    assert rows[4][-1] == str(EMBEDDING + NORM)
    total = 2 * MAMBA2 + ATTENTION + 2 * MLP + 6 * NORM + EMBEDDING
    assert rows[5] == ["total", f"{total / 1000:.2f}k", f"{(2 * mamba_bytes + 32000) / 1024:.1f}", "KiB"]
    assert len(lines) == 6
    assert "untied" in layer_table(build_model(small_config("T", tie_embeddings=False), VOCAB), 10)
