"""Fresh weights: every one is drawn, once, from the recipe of the configuration and the seed."""

from __future__ import annotations

import math

import pytest
import torch
from small_models import VOCAB, make_ids, small_config, small_model

from hybridlm.config.model import InitConfig
from hybridlm.errors import ConfigError
from hybridlm.model.build import build_model, fresh_model


def fresh(config, seed=0):
    return fresh_model(config, VOCAB, seed=seed, device="cpu")


@pytest.mark.parametrize("tied", [True, False])
def test_reset_leaves_no_parameter_out(tied):
    model = small_model(small_config("M:mlp T M:none", tie_embeddings=tied), torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    model.reset_parameters()
    assert [name for name, parameter in model.named_parameters() if not bool(parameter.isfinite().all())] == []


def test_a_fresh_model_leaves_the_meta_device_whole():
    config = small_config("MT", tie_embeddings=False)
    meta = build_model(config, VOCAB)
    assert all(parameter.is_meta for parameter in meta.parameters())
    model = fresh(config)
    assert not list(model.buffers()), "a buffer would be uninitialised memory after to_empty"
    assert {name: p.shape for name, p in model.named_parameters()} == {
        name: p.shape for name, p in meta.named_parameters()
    }
    assert all(p.device.type == "cpu" and p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    assert bool(model(make_ids(1, 4)).logits.isfinite().all())


def test_the_seed_decides():
    config = small_config("MT")
    first, again, other = (dict(fresh(config, seed).named_parameters()) for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = [name for name in first if not name.endswith(("norm.weight", ".D"))]
    assert all(not torch.equal(first[name], other[name]) for name in drawn)


def test_a_fresh_model_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fresh(small_config("MT"), seed=7)
    assert torch.equal(torch.rand(3), expected)


def test_tied_weights_are_one_tensor():
    tied, untied = fresh(small_config("M")), fresh(small_config("M", tie_embeddings=False))
    assert tied.head_weight is tied.embedding.weight
    assert "lm_head.weight" not in dict(tied.named_parameters())
    assert untied.head_weight is dict(untied.named_parameters())["lm_head.weight"]


def stds(config) -> dict[str, float]:
    return {
        name: float(parameter.detach().std())
        for name, parameter in fresh(config).named_parameters()
        if parameter.dim() == 2
    }


def test_the_recipe_reaches_every_matrix():
    """Four layers: the projections back are smaller by sqrt(2 * 4). Sizes are such that the deviations are within a few
    percent."""
    init = InitConfig(std=0.03, embedding_std=0.5, head_std=0.07, residual="depth")
    got = stds(small_config("TMTM", d_model=64, vocab_multiple=256, tie_embeddings=False, init=init))
    for name, std in got.items():
        match name.split(".")[-2]:
            case "embedding":
                want = 0.5
            case "lm_head":
                want = 0.07
            case "o_proj" | "out_proj" | "down_proj":
                want = 0.03 / math.sqrt(8)
            case _:
                want = 0.03
        assert std == pytest.approx(want, rel=0.08), name


@pytest.mark.parametrize("std", [None, 0.03])
def test_an_untied_head_is_drawn_like_a_projection(std):
    """``head_std: null`` means like projections: ``std``, or fan_in ** -0.5 where that is null too."""
    got = stds(small_config("T", d_model=64, vocab_multiple=256, tie_embeddings=False, init=InitConfig(std=std)))
    assert got["lm_head.weight"] == pytest.approx(std or 1 / 8, rel=0.05)


@pytest.mark.parametrize("pattern", ["T", "M:mlp"])
def test_zero_residual_starts_as_the_identity(pattern):
    """With zero projections back into the stream, every block passes its input through."""
    model = fresh(small_config(pattern * 2 if pattern == "T" else "(M:mlp)*2", init=InitConfig(residual="zero")))
    ids = make_ids(1, 5)
    x = model.embedding(ids)
    normed = x / (x.square().mean(-1, keepdim=True) + model.config.norm_eps).sqrt()
    assert torch.allclose(model(ids).logits, (normed @ model.head_weight.T)[..., :VOCAB], atol=1e-6)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused():
    with pytest.raises(ConfigError, match=r"12.*13"):
        build_model(small_config("M", vocab_size=12), VOCAB)
    assert build_model(small_config("M", vocab_size=40), VOCAB).embedding.weight.shape == (40, 8)


def test_the_vocabulary_is_padded_to_its_multiple():
    for vocab, rows in ((16, 16), (17, 24), (8, 8), (1, 8)):
        assert build_model(small_config("M"), vocab).embedding.weight.shape == (rows, 8)
