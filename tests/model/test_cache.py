"""The cache of a whole model: rows branch, move between caches, and survive saving."""

from __future__ import annotations

import io

import pytest
import torch
from recurrences import relative_error
from small_models import DOCUMENTS, TIME, alone, every_pattern, fed, make_ids, small_config, small_model

from hybridlm.config.mixers.attention import AttentionConfig
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


@pytest.mark.parametrize("pattern", ["M1 M1", "M2 M2"])
def test_gradients_reach_back_through_a_cache_of_states(pattern):
    """Text in pieces, single tokens among them, with gradients on: those of the whole text. States are not overwritten
    then."""
    model, ids = small_model(small_config(pattern)), make_ids(2, 9)
    weights = torch.randn(2, 9, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    grads = []
    for pieces in ([9], [4, 1, 1, 3]):
        cache = model.new_cache(2, 9)
        logits = torch.cat([model(part, cache=cache).logits for part in ids.split(pieces, dim=1)], 1)
        grads.append(torch.autograd.grad((logits * weights).square().sum(), list(model.parameters())))
    for whole, in_pieces in zip(*grads, strict=True):
        assert relative_error(in_pieces, whole) < 1e-10


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


@every_config
@pytest.mark.parametrize("length", [1, 4, 9])
def test_a_row_of_another_length_goes_on_among_the_others(config, length):
    model, ids, other = small_model(config), make_ids(3, 10), make_ids(1, length + 4, seed=8)
    cache = prefill(model, ids[:, :6])
    cache.insert(1, prefill(model, other[:, :length]))
    assert (cache.past, cache.lengths.tolist(), cache.ragged) == (max(6, length), [6, length, 6], True)
    whole, whole_other = model(ids).logits, model(other).logits
    for t in range(4):
        got = step(model, torch.stack([ids[0, 6 + t], other[0, length + t], ids[2, 6 + t]])[:, None], cache)
        assert relative_error(got[[0, 2], 0], whole[[0, 2], 6 + t]) < 1e-10
        assert relative_error(got[1, 0], whole_other[0, length + t]) < 1e-10


def test_replacing_the_longest_row_makes_room():
    model, ids = small_model(small_config("T")), make_ids(2, 20)
    cache = model.new_cache(2, 12)
    step(model, ids[:, :10], cache)
    for row in (0, 1):
        fresh = model.new_cache(1, 12)
        step(model, ids[row : row + 1, :3], fresh)
        cache.insert(row, fresh)
    assert (cache.past, cache.ragged) == (3, False)
    assert relative_error(step(model, ids[:, 3:12], cache), model(ids[:, :12]).logits[:, 3:]) < 1e-10


@every_pattern
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("way", ["select", "insert", "saved", "branched twice"])
def test_rows_move_in_every_state(pattern, with_documents, way):
    """Rows of unequal lengths, one of them ended, with documents open: chosen, replaced, saved; each goes on as it
    would have."""
    model, ids = small_model(small_config(pattern)), make_ids(3, TIME)
    doc_ids = DOCUMENTS[2:] if with_documents else torch.zeros_like(ids)
    valid = torch.ones(3, TIME, dtype=torch.bool)
    valid[0, :3], valid[1, 2:6] = False, False
    cache = model.new_cache(3, TIME)
    given = doc_ids if with_documents else None
    fed(model, ids[:, :9], cache, [4], None if given is None else given[:, :9], valid[:, :9])
    rows = torch.tensor([0, 1, 2])
    if way == "select":
        rows = torch.tensor([1, 0])
        cache = cache.select(rows)
    elif way == "branched twice":
        rows = torch.tensor([1, 1])
        cache = cache.select(torch.tensor([1])).select(torch.tensor([0, 0]))
        assert not cache.ragged
    elif way == "saved":
        state = {name: tensor.clone() for name, tensor in cache.state_dict().items()}
        cache = model.new_cache(3, TIME)
        cache.load_state_dict(state)
    else:
        rows = torch.tensor([0, 2, 2])
        other = model.new_cache(1, TIME)
        fed(model, ids[2:, :9], other, [2], None if given is None else given[2:, :9])
        cache.insert(1, other)
    assert cache.lengths.tolist() == valid[rows, :9].sum(1).tolist()
    ids, doc_ids, valid = ids[rows], doc_ids[rows], valid[rows]
    rest = fed(model, ids[:, 9:], cache, [1, 2, 6], doc_ids[:, 9:] if with_documents else None)
    assert relative_error(rest, alone(model, ids, doc_ids, valid)[:, 9:]) < 1e-10


def test_a_row_with_documents_among_rows_without():
    """What was not told apart is document 0."""
    model, ids = small_model(small_config("TWL")), make_ids(2, TIME)
    doc_ids = torch.stack([torch.zeros(TIME, dtype=torch.long), DOCUMENTS[2] + 5])
    cache, other = model.new_cache(2, TIME), model.new_cache(1, TIME)
    fed(model, ids[:, :9], cache)
    fed(model, ids[1:, :7], other, doc_ids=doc_ids[1:, :7])
    cache.insert(1, other)
    valid = torch.ones(2, TIME, dtype=torch.bool)
    valid[1, 7:9] = False
    assert cache.open_doc().tolist() == [0, int(doc_ids[1, 6])]
    rest = fed(model, ids[:, 9:], cache, [3], doc_ids[:, 9:])
    assert relative_error(rest, alone(model, ids, doc_ids, valid)[:, 9:]) < 1e-10


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


def test_a_refused_state_leaves_the_cache_as_it_was():
    model = small_model(small_config("MT"))
    ids = make_ids(2, 6)
    cache = prefill(model, ids)
    kept = {name: tensor.clone() for name, tensor in cache.state_dict().items()}
    with pytest.raises(ValueError, match=r"layers\.1\.k"):
        cache.load_state_dict(prefill(model, ids + 1, max_len=21).state_dict())
    assert all(torch.equal(tensor, kept[name]) for name, tensor in cache.state_dict().items())
