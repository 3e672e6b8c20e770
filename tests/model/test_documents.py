"""Documents packed into rows: every document gets the logits, the loss and the gradients that it would get alone,
however the row is cut into calls; without documents and padding nothing of all this runs."""

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

from hybridlm.layers.sequence import SequenceInfo
from hybridlm.model import lm
from hybridlm.model.cache import ModelCache
from hybridlm.model.columns import sequence_info

ROWS = len(DOCUMENTS)
CPU = torch.device("cpu")


def next_tokens(ids: Tensor, doc_ids: Tensor) -> Tensor:
    """Every token's successor in its own document; a document's last token has none."""
    same = doc_ids[:, 1:] == doc_ids[:, :-1]
    return torch.cat([torch.where(same, ids[:, 1:], -100), torch.full_like(ids[:, :1], -100)], 1)


@every_pattern
def test_logits_loss_and_every_gradient_are_those_of_each_document_alone(pattern):
    assert_near(*packed_and_apart(pattern, torch.float64), 1e-10)


@every_pattern
def test_the_same_in_float32(pattern):
    """To 1e-5, or to what float32 leaves of the documents run apart: a router behind two Mamba-3 layers loses more than
    that by itself."""
    (packed, apart), (_, exact) = (packed_and_apart(pattern, dtype) for dtype in (torch.float32, torch.float64))
    assert_near(packed, apart, max(1e-5, *(relative_error(apart[name], exact[name]) for name in exact)))


@cache
def packed_and_apart(pattern: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Logits, loss and gradients of the rows in one forward, and of every document in its own."""
    model, ids = small_model(small_config(pattern), dtype), make_ids(ROWS, TIME)
    targets, logits = next_tokens(ids, DOCUMENTS), alone_recorded(model, ids, DOCUMENTS)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    output = model(ids, doc_ids=DOCUMENTS, targets=targets)
    assert int(output.n_tokens) == int((targets != -100).sum())
    packed = {"logits": model(ids, doc_ids=DOCUMENTS).logits} | loss_and_gradients(model, output.loss_sum)
    return packed, {"logits": logits.detach()} | loss_and_gradients(model, loss)


@every_pattern
def test_checkpointed_blocks_give_the_same_gradients(pattern):
    model, ids = small_model(small_config(pattern)), make_ids(ROWS, TIME)
    results = []
    for model.checkpoint_blocks in (0, 1):
        results.append(
            loss_and_gradients(model, model(ids, doc_ids=DOCUMENTS, targets=next_tokens(ids, DOCUMENTS)).loss_sum)
        )
    assert_near(*results, 1e-12)


@every_pattern
def test_prefill_cut_anywhere_and_decode(pattern):
    """A boundary inside a piece, at its edge, and in front of it; then every row's last document goes on without its
    id."""
    model, ids = small_model(small_config(pattern)), make_ids(ROWS, TIME + 4)
    want = alone(model, ids, torch.cat([DOCUMENTS, DOCUMENTS[:, -1:].expand(-1, 4)], 1))

    @settings(max_examples=8, deadline=None, derandomize=True, database=None)
    @given(cuts=st.sets(st.integers(1, TIME - 1)))
    def gives_the_same(cuts):
        cache = model.new_cache(ROWS, TIME + 4)
        told = fed(model, ids[:, :TIME], cache, cuts, DOCUMENTS)
        untold = fed(model, ids[:, TIME:], cache, [1, 2])
        assert relative_error(torch.cat([told, untold], 1), want) < 1e-10
        assert cache.lengths.tolist() == [TIME + 4] * ROWS

    gives_the_same()


@every_pattern
def test_a_boundary_at_every_column_of_a_decode(pattern):
    model, ids = small_model(small_config(pattern)), make_ids(TIME - 1, TIME)
    doc_ids = (torch.arange(TIME) >= torch.arange(1, TIME)[:, None]).long()
    cache = model.new_cache(TIME - 1, TIME)
    assert relative_error(fed(model, ids, cache, range(1, TIME), doc_ids), alone(model, ids, doc_ids)) < 1e-10


@every_pattern
@pytest.mark.parametrize("cuts", [[], [4, 9, 10, 13]], ids=["whole", "pieces"])
def test_an_id_may_come_again_for_another_document(pattern, cuts):
    """Ids that count from zero in every call, or name a source: what is new is that the id changes, and nothing old
    comes back."""
    doc_ids = torch.tensor([[0] * 3 + [1] * 3 + [0] * 5 + [1] * 6, [7] * 5 + [2] + [7] * 11])
    model, ids = small_model(small_config(pattern)), make_ids(2, TIME)
    assert relative_error(model(ids, doc_ids=doc_ids).logits, alone(model, ids, doc_ids)) < 1e-10
    cache = model.new_cache(2, TIME)
    assert relative_error(fed(model, ids, cache, cuts, doc_ids), alone(model, ids, doc_ids)) < 1e-10


@every_pattern
def test_documents_told_apart_after_a_plain_prefill(pattern):
    """What was not told apart is document 0: the next id goes on with it if it is 0, and begins anew if not."""
    model, ids = small_model(small_config(pattern)), make_ids(2, TIME)
    cache = model.new_cache(2, TIME)
    first = fed(model, ids[:, :6], cache)
    later = torch.tensor([[0] * 4 + [3] * 7, [5] * 11])
    rest = fed(model, ids[:, 6:], cache, [2, 7], later)
    doc_ids = torch.cat([torch.zeros(2, 6, dtype=torch.long), later], 1)
    assert relative_error(torch.cat([first, rest], 1), alone(model, ids, doc_ids)) < 1e-10


@every_pattern
def test_one_document_is_no_document(pattern):
    """The same text with one id, with any number of calls that give it, and with none."""
    model, ids = small_model(small_config(pattern)), make_ids(2, TIME)
    whole = model(ids).logits
    assert relative_error(model(ids, doc_ids=torch.full_like(ids, 4)).logits, whole) < 1e-12
    cache = model.new_cache(2, TIME)
    pieces = [fed(model, ids[:, :6], cache, doc_ids=torch.full_like(ids[:, :6], 4)), fed(model, ids[:, 6:], cache, [1])]
    assert relative_error(torch.cat(pieces, 1), whole) < 1e-10


def test_positions_restart_and_go_on():
    cache = ModelCache([], 2, CPU)
    calls = [
        (
            [[3, 3, 8, 8], [1, 1, 1, 1]],
            [[0, 1, 0, 1], [0, 1, 2, 3]],
            [[True, False, True, False], [True, False, False, False]],
        ),
        ([[8, 9, 9], [1, 2, 3]], [[2, 0, 1], [4, 0, 0]], [[False, True, False], [False, True, True]]),
        (None, [[2, 3], [1, 2]], None),
        ([[9], [4]], [[4], [0]], [[False], [True]]),
    ]
    for doc_ids, positions, starts in calls:
        documents = None if doc_ids is None else torch.tensor(doc_ids)
        seq = sequence_info(len(positions[0]), cache, documents, None, torch.tensor(positions))
        assert seq.positions.tolist() == positions
        assert (None if seq.starts is None else seq.starts.tolist()) == starts
        assert seq.doc_ids is not None
        assert not seq.plain
        cache.advance(seq)
    assert cache.next_position.tolist() == [5, 1]
    assert cache.last_doc.tolist() == [9, 4]


def test_the_cache_does_not_hold_what_the_caller_may_overwrite():
    model, ids = small_model(small_config("TW")), make_ids(2, TIME)
    doc_ids = DOCUMENTS[2:4].clone()
    cache = model.new_cache(2, TIME)
    first = fed(model, ids[:, :8], cache, doc_ids=doc_ids)
    want = alone(model, ids, DOCUMENTS[2:4])
    doc_ids.fill_(77)
    rest = fed(model, ids[:, 8:], cache, doc_ids=DOCUMENTS[2:4, 8:])
    assert relative_error(torch.cat([first, rest], 1), want) < 1e-10


@every_pattern
def test_without_documents_and_padding_nothing_extra_runs(pattern, monkeypatch):
    """No mask, no rearranging, and every layer is told so."""
    model, ids = small_model(small_config(pattern)), make_ids(2, TIME)

    def forbidden(*args: object, **settings: object) -> None:
        raise AssertionError("this is only for documents and padding")

    told: list[SequenceInfo] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: told.append(args[1]))
    monkeypatch.setattr(SequenceInfo, "visible", forbidden)
    if "moe" not in pattern:  # whose routing scatters tokens anyway
        monkeypatch.setattr(Tensor, "scatter_", forbidden)
    monkeypatch.setattr(lm, "padding_first", forbidden)
    model(ids)
    fed(model, ids, model.new_cache(2, TIME), [6, 7, 8])
    assert len(told) == len(model.blocks) * 5
    assert all(seq.plain and seq.padding is None and seq.longest is None for seq in told)
    with pytest.raises(AssertionError, match="only for documents"):
        model(ids, valid=torch.ones_like(ids, dtype=torch.bool))


def test_masks_and_rotations_are_made_once_per_forward(monkeypatch):
    """Six layers, of which three see the same, and all turn alike."""
    model, ids = small_model(small_config("TTTWWW")), make_ids(ROWS, TIME)
    made: list[tuple[int | None, int | None]] = []
    original = SequenceInfo._visible
    monkeypatch.setattr(SequenceInfo, "_visible", lambda seq, *args: made.append(args) or original(seq, *args))
    model(ids, doc_ids=DOCUMENTS)
    assert made == [(None, 0), (3, 0)]
