"""Padding anywhere in a row, rows of unequal lengths, rows that pause: each row is what its tokens are alone."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrences import assert_near, relative_error
from small_models import (
    DOCUMENTS,
    TIME,
    alone,
    alone_recorded,
    every_pattern,
    fed,
    loss_and_gradients,
    make_ids,
    small_config,
    small_model,
)
from torch import Tensor

from hybridlm.config.mixers.attention import AttentionConfig
from hybridlm.layers.cache import TokenCache
from hybridlm.model.lm import HybridLM

columns = torch.arange(TIME)
PLACES = {
    "left": torch.stack([columns >= width for width in (0, 3, 16, 9)]),
    "right": torch.stack([columns < length for length in (17, 14, 1, 8)]),
    "middle": torch.stack([(columns < 4) | (columns >= 9), columns != 8, columns % 2 == 0, columns % 5 != 0]),
    "a row of nothing else": torch.stack([columns >= 0, columns < 0, columns >= 5, columns < 0]),
}
ROWS = 4
every_place = pytest.mark.parametrize("valid", PLACES.values(), ids=PLACES)


@every_pattern
@every_place
def test_without_a_cache(pattern, valid):
    model, ids = small_model(small_config(pattern)), make_ids(ROWS, TIME)
    logits = model(ids, valid=valid).logits
    assert bool(logits.isfinite().all())
    assert relative_error(logits[valid], alone(model, ids, valid=valid)[valid]) < 1e-10


@every_pattern
def test_loss_and_every_gradient(pattern):
    """Targets at padding do not count, whatever they are; with documents in the rows as well."""
    model, ids, valid = small_model(small_config(pattern)), make_ids(ROWS, TIME), PLACES["middle"]
    targets, doc_ids = make_ids(ROWS, TIME, seed=3), DOCUMENTS[1:]
    output = model(ids, valid=valid, doc_ids=doc_ids, targets=targets)
    assert int(output.n_tokens) == int(valid.sum())
    logits = alone_recorded(model, ids, doc_ids, valid)
    want = torch.nn.functional.cross_entropy(logits[valid], targets[valid], reduction="sum")
    assert_near(loss_and_gradients(model, output.loss_sum), loss_and_gradients(model, want), 1e-10)


@every_pattern
def test_logits_in_float32(pattern):
    """To 1e-5, or to what float32 leaves of the rows run alone."""
    model, exact, ids = (
        small_model(small_config(pattern), torch.float32),
        small_model(small_config(pattern)),
        make_ids(ROWS, TIME),
    )
    for valid in PLACES.values():
        want = alone(model, ids, DOCUMENTS[1:], valid)[valid]
        tolerance = max(1e-5, relative_error(want, alone(exact, ids, DOCUMENTS[1:], valid)[valid]))
        assert relative_error(model(ids, doc_ids=DOCUMENTS[1:], valid=valid).logits[valid], want) < tolerance


@cache
def alone_and_longer(pattern: str, place: str) -> Tensor:
    """Logits of the rows alone, four tokens longer."""
    valid = torch.cat([PLACES[place], torch.ones(ROWS, 4, dtype=torch.bool)], 1)
    return alone(small_model(small_config(pattern)), make_ids(ROWS, TIME + 4), valid=valid)


@every_pattern
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("cuts", [[], [5, 6, 12], range(1, TIME)], ids=["prefill", "pieces", "decode"])
def test_with_a_cache(pattern, place, cuts):
    """Then all rows go on together, without a word about padding, from the different lengths that they have."""
    model, ids, valid = small_model(small_config(pattern)), make_ids(ROWS, TIME + 4), PLACES[place]
    cache = model.new_cache(ROWS, TIME + 4)
    first = fed(model, ids[:, :TIME], cache, cuts, valid=valid)
    assert cache.lengths.tolist() == valid.sum(1).tolist()
    assert cache.past == max(cache.lengths.tolist())
    rest = fed(model, ids[:, TIME:], cache, [1, 2])
    assert relative_error(torch.cat([first, rest], 1), alone_and_longer(pattern, place)) < 1e-10


@every_pattern
@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(cuts=st.sets(st.integers(1, TIME - 1)), seed=st.integers(0, 1000), share=st.sampled_from([0.3, 0.7, 0.95]))
def test_documents_in_rows_with_padding_anywhere(pattern, cuts, seed, share):
    """Any documents, any padding, any cut, then decode without documents, where rows pause at will."""
    model, ids = small_model(small_config(pattern)), make_ids(ROWS, TIME + 4)
    g = torch.Generator().manual_seed(seed)
    doc_ids = (torch.rand(ROWS, TIME, generator=g) < 0.3).long().cumsum(1) + 5
    valid = torch.rand(ROWS, TIME + 4, generator=g) < share
    valid[:, 0] = (
        True  # a row that is empty where documents go untold begins document 0, which this comparison does not know
    )
    doc_ids = torch.where(valid[:, :TIME], doc_ids, 99)  # what stands at padding has no meaning
    cache = model.new_cache(ROWS, TIME + 4)
    told = fed(model, ids[:, :TIME], cache, cuts, doc_ids, valid[:, :TIME])
    untold = fed(model, ids[:, TIME:], cache, [1, 2], valid=valid[:, TIME:])
    goes_on = torch.stack([row[kept][-1:].expand(4) for row, kept in zip(doc_ids, valid[:, :TIME], strict=True)])
    want = alone(model, ids, torch.cat([doc_ids, goes_on], 1), valid)
    assert relative_error(torch.cat([told, untold], 1), want) < 1e-10


def states(cache) -> list[Tensor]:
    return [tensor.clone() for layer in cache.layers for tensor in layer.tensors().values()]


@every_pattern
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["cache_float64", "cache_bfloat16"])
@pytest.mark.parametrize("with_documents", [False, True])
def test_a_row_that_has_ended_keeps_every_bit(pattern, dtype, with_documents):
    """One that has ended, and one that has not begun; the latter begins later, the former goes on."""
    model, ids = small_model(small_config(pattern)), make_ids(3, 30)
    cache = model.new_cache(3, 30, dtype=dtype)
    documents = torch.arange(30).div(4, rounding_mode="floor").expand(3, 30) if with_documents else None
    valid = torch.ones(3, 30, dtype=torch.bool)
    valid[1, :9], valid[2, 7:20] = False, False
    fed(model, ids[:, :8], cache, [5], None if documents is None else documents[:, :8], valid[:, :8])
    before = states(cache)
    fed(model, ids[:, 8:9], cache, doc_ids=None if documents is None else documents[:, 8:9], valid=valid[:, 8:9])
    for now, then in zip(states(cache), before, strict=True):
        assert torch.equal(now[1:], then[1:])
    assert cache.lengths.tolist() == [9, 0, 7]
    fed(model, ids[:, 9:12], cache, doc_ids=None if documents is None else documents[:, 9:12], valid=valid[:, 9:12])
    for now, then in zip(states(cache), before, strict=True):
        assert torch.equal(now[2], then[2])
        assert not torch.equal(now[1], then[1])
    if dtype == torch.float64:
        rest = fed(model, ids[:, 12:], cache, [14, 17], None if documents is None else documents[:, 12:], valid[:, 12:])
        assert relative_error(rest, alone(model, ids, documents, valid)[:, 12:]) < 1e-10


def test_a_window_counts_tokens_and_not_columns():
    """With padding in between, a token still sees the two tokens before it, and only those."""
    model, ids = small_model(small_config("W:none")), make_ids(1, TIME)
    valid = (columns % 3 == 0)[None]  # six tokens
    tokens = ids[:, valid[0]]
    logits = model(ids, valid=valid).logits[:, valid[0]]
    for changed, same in [(2, True), (3, False)]:
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % 13
        spread = ids.masked_scatter(valid, other)
        assert torch.equal(model(spread, valid=valid).logits[0, valid[0]][5], logits[0, 5]) == same


@pytest.mark.parametrize("max_len", [21, 3, 2])
@pytest.mark.parametrize("window", [1, 2, 3, 8])
def test_bounded_caches_hold_tokens_and_not_columns(window, max_len):
    """Where the window is longer than max_len, all tokens are kept, and no more than max_len fit, padding not
    counted."""
    model = small_model(
        small_config("TT", attention=AttentionConfig(n_heads=2, n_kv_heads=1, rope=True, window=window))
    )
    ids, valid = make_ids(ROWS, TIME + 4), torch.ones(ROWS, TIME + 4, dtype=torch.bool)
    valid[:, :TIME] = PLACES["middle"]
    cache = model.new_cache(ROWS, max_len)
    layer = cache.layers[0]
    assert isinstance(layer, TokenCache)
    if window > max_len:
        assert layer.bounded is None
        with pytest.raises(ValueError, match=r"tokens, \d+ are needed"):
            fed(model, ids, cache, [3, 4, 9], valid=valid)
    else:
        assert layer.capacity == window - 1
        assert (
            relative_error(fed(model, ids, cache, [3, 4, 9, 18], valid=valid), alone(model, ids, valid=valid)) < 1e-10
        )


def filled(model: HybridLM, lengths: list[int], max_len: int):
    """A cache whose rows hold so many tokens, and those tokens."""
    ids = make_ids(len(lengths), max(lengths))
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    cache = model.new_cache(len(lengths), max_len)
    fed(model, ids, cache, valid=valid)
    return cache, ids, valid


@every_pattern
def test_padding_takes_no_room(pattern):
    """A full row that has ended does not keep the others from going on; and calls may be wider than what is left."""
    model = small_model(small_config(pattern))
    cache, ids, valid = filled(model, [10, 3], 10)
    more, more_valid = make_ids(2, 12, seed=4), torch.arange(12).expand(2, 12) >= torch.tensor([[12], [5]])
    got = fed(model, more, cache, [8], valid=more_valid)
    assert cache.lengths.tolist() == [10, 10]
    want = alone(model, torch.cat([ids, more], 1), valid=torch.cat([valid, more_valid], 1))[:, 10:]
    assert relative_error(got, want) < 1e-10


def test_a_row_that_does_not_fit_is_refused():
    model = small_model(small_config("T"))
    cache, _, _ = filled(model, [10, 3], 10)
    with pytest.raises(ValueError, match=r"holds 10 tokens, 11 are needed"):
        fed(model, make_ids(2, 1), cache)
    with pytest.raises(ValueError, match=r"holds 10 tokens, 11 are needed"):
        fed(model, make_ids(2, 8), cache, valid=torch.tensor([[False] * 8, [True] * 8]))


def test_only_the_last_column_is_asked_for():
    """``keep`` names columns as they were given."""
    model, ids = small_model(small_config("MTWL")), make_ids(ROWS, TIME)
    for valid in PLACES.values():
        logits = model(ids, valid=valid).logits
        assert relative_error(model(ids, valid=valid, keep="last").logits, logits[:, -1:]) < 1e-12
        assert relative_error(model(ids, valid=valid, keep=3).logits, logits[:, -3:]) < 1e-12
