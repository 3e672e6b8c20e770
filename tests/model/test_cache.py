"""The cache of a whole model: rows branch, move between caches, and survive saving."""

from __future__ import annotations

import io

import pytest
import torch
from recurrences import relative_error
from small_models import make_ids, small_config, small_model

from hybridlm.config.model import AttentionConfig
from hybridlm.model.cache import ModelCache
from hybridlm.model.lm import HybridLM

CONFIGS = {"full": small_config("MTM"), "window": small_config("MTM", attention=AttentionConfig(n_heads=2, window=3))}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def prefill(model: HybridLM, ids: torch.Tensor, max_len: int = 20) -> ModelCache:
    cache = model.new_cache(ids.shape[0], max_len)
    step(model, ids, cache)
    return cache


def step(model: HybridLM, ids: torch.Tensor, cache: ModelCache) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, cache=cache).logits


@every_config
def test_selected_rows_go_on_as_they_would_have(config):
    model, ids = small_model(config), make_ids(3, 10)
    rows = torch.tensor([2, 0, 2])
    branch = prefill(model, ids[:, :6]).select(rows)
    assert (branch.past, branch.lengths.tolist()) == (6, [6, 6, 6])
    whole = model(ids[rows]).logits
    for t in range(6, 10):
        assert relative_error(step(model, ids[rows, t : t + 1], branch), whole[:, t : t + 1]) < 1e-10


@every_config
def test_branches_do_not_share_memory(config):
    """A row that is there twice continues in two ways, and the cache it came from in a third."""
    model, prompt = small_model(config), make_ids(1, 6)
    cache = prefill(model, prompt)
    branch = cache.select(torch.tensor([0, 0]))
    ends = torch.tensor([[1, 2], [7, 8], [4, 4]])
    got = [step(model, ends[2:, :1], cache)]
    for t in range(2):
        got_branch = step(model, ends[:2, t : t + 1], branch)
    got.append(step(model, ends[2:, 1:], cache))
    whole = model(torch.cat([prompt.expand(3, -1), ends], 1)).logits
    assert relative_error(got_branch, whole[:2, -1:]) < 1e-10
    assert relative_error(torch.cat(got, 1), whole[2:, -2:]) < 1e-10
    assert cache.lengths.tolist() == [8]


@every_config
def test_an_inserted_row_goes_on_among_the_others(config):
    model, ids, other = small_model(config), make_ids(3, 10), make_ids(1, 10, seed=8)
    cache = prefill(model, ids[:, :6])
    cache.insert(1, prefill(model, other[:, :6]))
    mixed = torch.stack([ids[0], other[0], ids[2]])
    whole = model(mixed).logits
    for t in range(6, 10):
        assert relative_error(step(model, mixed[:, t : t + 1], cache), whole[:, t : t + 1]) < 1e-10


def test_a_row_from_another_column_is_refused():
    model, ids = small_model(small_config("T")), make_ids(2, 6)
    cache = prefill(model, ids)
    with pytest.raises(ValueError, match=r"column 4, this cache at 6"):
        cache.insert(0, prefill(model, ids[:1, :4]))


@every_config
def test_a_saved_cache_goes_on_in_another(config):
    model, ids = small_model(config), make_ids(2, 10)
    file = io.BytesIO()
    torch.save(prefill(model, ids[:, :6]).state_dict(), file)
    file.seek(0)
    cache = model.new_cache(2, 20)
    cache.load_state_dict(torch.load(file, weights_only=True))
    assert (cache.past, cache.lengths.tolist()) == (6, [6, 6])
    assert relative_error(step(model, ids[:, 6:], cache), model(ids).logits[:, 6:]) < 1e-10


@every_config
def test_a_saved_state_can_be_loaded_twice(config):
    """Going on after loading leaves the loaded state as it was: several continuations of one prompt."""
    model, ids = small_model(config), make_ids(2, 10)
    saved = {name: tensor.clone() for name, tensor in prefill(model, ids[:, :6]).state_dict().items()}
    kept = {name: tensor.clone() for name, tensor in saved.items()}
    for _ in range(2):
        cache = model.new_cache(2, 20)
        cache.load_state_dict(saved)
        assert cache.lengths.tolist() == [6, 6]
        assert relative_error(step(model, ids[:, 6:], cache), model(ids).logits[:, 6:]) < 1e-10
    assert all(torch.equal(saved[name], kept[name]) for name in kept)


@every_config
def test_two_caches_do_not_share_a_state(config):
    """The cache that was saved may go on too, before the other does."""
    model, ids = small_model(config), make_ids(2, 10)
    first = prefill(model, ids[:, :6])
    second = model.new_cache(2, 20)
    second.load_state_dict(first.state_dict())
    step(model, ids[:, 6:], first)
    assert (second.past, second.lengths.tolist()) == (6, [6, 6])
    assert relative_error(step(model, ids[:, 6:], second), model(ids).logits[:, 6:]) < 1e-10


def test_a_state_of_another_shape_is_refused():
    model = small_model(small_config("MT"))
    state = prefill(model, make_ids(2, 6)).state_dict()
    with pytest.raises(ValueError, match=r"layers\.0\.conv"):
        model.new_cache(3, 20).load_state_dict(state)
    with pytest.raises(ValueError, match=r"layers\.1\.k"):
        model.new_cache(2, 21).load_state_dict(state)
    del state["layers.0.ssm"]
    with pytest.raises(KeyError):
        model.new_cache(2, 20).load_state_dict(state)
