"""Prepared decoding against the model's own forward: every option that the prepared steps read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from recurrences import relative_error
from small_models import VOCAB, every_pattern, make_ids, small_config, small_model

from hybridlm.config.ffns.mlp import MLPConfig
from hybridlm.config.mixers.attention import AttentionConfig
from hybridlm.config.mixers.mamba2 import Mamba2Config
from hybridlm.model.decoder import Decoder
from hybridlm.ops.kernels.choice import ALL_TORCH, CUDA

MAMBA2 = {"d_state": 3, "head_dim": 4, "chunk": 5}
CHANGES = {
    "one group": {"mamba2": Mamba2Config(**MAMBA2)},
    "groups": {"mamba2": Mamba2Config(**MAMBA2, n_groups=4)},
    "norm before gate": {"mamba2": Mamba2Config(**MAMBA2, n_groups=2, norm_before_gate=True)},
    "clamped steps": {"mamba2": Mamba2Config(**MAMBA2, dt_limit=(0.2, 0.5))},
    "two taps": {"mamba2": Mamba2Config(**MAMBA2, d_conv=2)},
    "a key head per query head": {"attention": AttentionConfig(n_heads=2, rope=True)},
    "no positions": {"attention": AttentionConfig(n_heads=4, n_kv_heads=2)},
    "a part of a head rotated": {"attention": AttentionConfig(n_heads=2, rope=True, rope_fraction=0.5)},
    "gate": {"attention": AttentionConfig(n_heads=2, rope=True, gate=True)},
    "norms of queries and keys": {"attention": AttentionConfig(n_heads=2, n_kv_heads=1, rope=True, qk_norm=True)},
    "scaled scores": {"attention": AttentionConfig(n_heads=2, scale=0.9)},
    "a window longer than the cache": {"attention": AttentionConfig(n_heads=2, n_kv_heads=1, rope=True, window=40)},
    "a window shorter than the cache": {"attention": AttentionConfig(n_heads=2, window=4)},
    "squared ReLU": {"mlp": MLPConfig(d_ff=12, activation="relu2")},
    "multipliers": {"embedding_scale": 3.0, "residual_scale": 0.7, "logit_scale": 0.5, "logit_softcap": 2.0},
    "untied head": {"tie_embeddings": False},
    "wide enough for blocks of rows": {"d_model": 64, "mlp": MLPConfig(d_ff=96)},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_forward(changes, dtype):
    """After a prefill and from an empty cache, for one row and for three."""
    model = small_model(small_config("MTMT:none M:mlp", **changes), dtype).eval()
    decoder = Decoder(model)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    for rows in (1, 3):
        ids = make_ids(rows, 20)
        with torch.no_grad():
            want = model(ids).logits
        for given in (0, 9):
            cache = model.new_cache(rows, 20)
            with torch.inference_mode():
                if given:
                    model(ids[:, :given], cache)
                got = torch.stack([decoder(ids[:, t], cache) for t in range(given, 20)], 1)
            assert relative_error(got, want[:, given:]) < tolerance
            assert (cache.past, cache.lengths.tolist()) == (20, [20] * rows)


@every_pattern
def test_every_kind_of_layer(pattern):
    model = small_model(small_config(pattern))
    ids, cache = make_ids(2, 17), model.new_cache(2, 17)
    decoder = Decoder(model)
    got = torch.stack([decoder(ids[:, t], cache) for t in range(17)], 1)
    with torch.no_grad():
        assert relative_error(got, model(ids).logits) < 1e-10


def test_cache_grows_past_the_window():
    """The cache becomes bounded between two tokens."""
    model = small_model(small_config("TT", attention=AttentionConfig(n_heads=2, window=6)))
    ids, cache = make_ids(1, 30), model.new_cache(1, 5)
    decoder = Decoder(model)
    got = [decoder(ids[:, t], cache) for t in range(5)]
    cache.grow(30)
    got += [decoder(ids[:, t], cache) for t in range(5, 30)]
    with torch.no_grad():
        assert relative_error(torch.stack(got, 1), model(ids).logits) < 1e-10


@every_pattern
def test_rows_of_different_lengths(pattern):
    model = small_model(small_config(pattern))
    ids, cache = make_ids(2, 10), model.new_cache(2, 10)
    decoder = Decoder(model)
    with torch.no_grad():
        model(ids[:, :6], cache, valid=torch.tensor([[True] * 6, [False] * 3 + [True] * 3]))
        got = torch.stack([decoder(ids[:, t], cache) for t in range(6, 10)], 1)
        for row, start in enumerate((0, 3)):
            assert relative_error(got[row], model(ids[row : row + 1, start:]).logits[0, 6 - start :]) < 1e-10


@pytest.mark.parametrize("way", ["documents", "bfloat16", "autocast"])
def test_falls_back_to_forward(way):
    """Bit for bit."""
    model = small_model(small_config("MTL"), torch.bfloat16 if way == "bfloat16" else torch.float32)
    decoder, caches = Decoder(model), [model.new_cache(2, 12) for _ in range(2)]
    ids = make_ids(2, 10)
    doc_ids = torch.tensor([[0, 0, 1, 1, 1, 2]] * 2) if way == "documents" else None
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=way == "autocast"):
        for cache in caches:
            model(ids[:, :6], cache, doc_ids=doc_ids)
        for t in range(6, 10):
            assert torch.equal(decoder(ids[:, t], caches[0]), model(ids[:, t : t + 1], caches[1]).logits[:, -1])


def test_kernels_reach_the_layers():
    model = small_model(small_config("M"))
    model.kernels = replace(ALL_TORCH, conv=CUDA)
    seen = []
    model.blocks[0].mixer.register_forward_pre_hook(lambda module, given: seen.append(given[1].kernels.conv))
    Decoder(model)(torch.tensor([1]), model.new_cache(1, 2))
    assert seen == [CUDA]


def test_full_cache_is_an_error():
    model = small_model(small_config("T"))
    decoder, cache = Decoder(model), model.new_cache(1, 2)
    for _ in range(2):
        decoder(torch.tensor([VOCAB - 1]), cache)
    with pytest.raises(ValueError, match="holds 2 tokens, 3 are needed"):
        decoder(torch.tensor([0]), cache)
