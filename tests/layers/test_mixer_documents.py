"""Documents packed into one row: each is what it would be alone, wherever it begins, however the row is cut, and
nothing passes between them, in either direction."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixer_specs import CPU, assert_same, every_mixer, forward, make_input, make_mixer
from recurrences import document_by_document, relative_error
from torch import Tensor

from hybridlm.config.layers import Spec
from hybridlm.layers.mixer import Mixer
from hybridlm.layers.sequence import SequenceInfo
from hybridlm.model.cache import ModelCache
from hybridlm.model.columns import sequence_info

TIME = 17
LAYOUTS = [
    [1] * 17,
    [3, 1, 1, 5, 7],
    [8, 8, 1],
    [7, 1, 9],
    [17],
]  # lengths of a row's documents; chunks hold 1, 5 or 8 tokens
MIXED = torch.tensor([[i for i, length in enumerate(row) for _ in range(length)] for row in LAYOUTS])
EVERY_BOUNDARY = torch.stack(
    [(torch.arange(TIME) >= boundary).long() for boundary in range(1, TIME)]
)  # two documents in each row
DOCUMENTS = {"every boundary": EVERY_BOUNDARY, "mixed": MIXED, "two rows": MIXED[:2], "two ids": MIXED % 2}


def described(doc_ids: Tensor, start: int = 0, end: int | None = None, *, quiet: bool = False) -> SequenceInfo:
    """Columns ``start`` to ``end`` of rows with these documents (B, T), by hand; quiet: without ``starts`` where no
    document begins."""
    begins = torch.ones_like(doc_ids, dtype=torch.bool)
    begins[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
    positions = torch.zeros_like(doc_ids)
    for t in range(1, doc_ids.shape[1]):
        positions[:, t] = torch.where(begins[:, t], 0, positions[:, t - 1] + 1)
    columns = slice(start, end)
    starts = None if quiet and not begins[:, columns].any() else begins[:, columns]
    return SequenceInfo(positions[:, columns], start, starts=starts, doc_ids=doc_ids[:, columns])


def in_pieces(mixer: Mixer, x: Tensor, doc_ids: Tensor, cuts: list[int], quiet: bool) -> Tensor:
    cache = mixer.new_cache(x.shape[0], x.shape[1], dtype=x.dtype, device=CPU)
    with torch.no_grad():
        pieces = [
            mixer(x[:, a:b], described(doc_ids, a, b, quiet=quiet), cache) for a, b in pairwise([0, *cuts, x.shape[1]])
        ]
    return torch.cat(pieces, 1)


def alone(mixer: Mixer, x: Tensor, doc_ids: Tensor) -> Tensor:
    return document_by_document(lambda document: forward(mixer, document), x, doc_ids)


def test_the_description_by_hand_is_the_models():
    cache = ModelCache([], len(MIXED), CPU)
    for a, b in pairwise([0, 5, 6, TIME]):
        made, by_hand = sequence_info(b - a, cache, MIXED[:, a:b], None, MIXED[:, a:b]), described(MIXED, a, b)
        assert made.past == by_hand.past
        for name in ("positions", "starts", "doc_ids"):
            assert torch.equal(getattr(made, name), getattr(by_hand, name)), name
        cache.advance(made)


@cache
def output_and_gradients(spec: Spec, layout: str, dtype: torch.dtype, *, packed: bool) -> dict[str, Tensor]:
    """Output and every gradient; in float32 those of every row's own loss, since their sum may cancel to less than its
    rounding."""
    mixer, doc_ids = make_mixer(spec, dtype), DOCUMENTS[layout]
    x, weights = (make_input(len(doc_ids), TIME, dtype, seed=seed) for seed in (1, 5))
    leaves = {"x": x.requires_grad_(), **dict(mixer.named_parameters())}
    y = mixer(x, described(doc_ids)) if packed else alone(mixer, x, doc_ids)
    losses = (y * weights).sum((1, 2))  # of each row
    wanted = losses if dtype == torch.float32 else [losses.sum()]
    each = [torch.autograd.grad(loss, leaves.values(), retain_graph=True) for loss in wanted]
    return {"y": y} | {
        f"d{name}": torch.stack(grads) for name, grads in zip(leaves, zip(*each, strict=True), strict=True)
    }


@cache
def alone_at_every_boundary(spec: Spec) -> Tensor:
    with torch.no_grad():
        return alone(make_mixer(spec), make_input(TIME - 1, TIME), EVERY_BOUNDARY)


EXACT, ROUNDED = (torch.float64, 1e-10), (torch.float32, 1e-5)


@every_mixer
@pytest.mark.parametrize(
    ("layout", "dtype", "tolerance"),
    [
        pytest.param("every boundary", *EXACT, id="every_boundary-float64"),
        pytest.param("mixed", *EXACT, id="mixed-float64"),
        pytest.param("two rows", *ROUNDED, id="two_rows-float32"),
        pytest.param("mixed", *ROUNDED, id="mixed-float32", marks=pytest.mark.slow),  # a gradient for each row
        pytest.param("every boundary", *ROUNDED, id="every_boundary-float32", marks=pytest.mark.slow),
    ],
)
def test_packed_documents_are_what_each_is_alone(spec, layout, dtype, tolerance):
    """Output and every gradient."""
    assert_same(*(output_and_gradients(spec, layout, dtype, packed=packed) for packed in (True, False)), tolerance)


@every_mixer
def test_an_id_may_come_again_for_another_document(spec):
    again, once = (output_and_gradients(spec, layout, torch.float64, packed=True) for layout in ("two ids", "mixed"))
    assert_same(again, once, 1e-12)


@pytest.mark.slow
@every_mixer
@settings(max_examples=6, deadline=None, derandomize=True, database=None)
@given(cuts=st.sets(st.integers(1, TIME + 3)), quiet=st.booleans(), ids=st.sampled_from([MIXED, MIXED % 2]))
def test_any_cut_of_packed_documents_gives_the_same(spec, cuts, quiet, ids):
    """Boundaries inside pieces, between them and in decode; the last document goes on in pieces where none begins."""
    doc_ids = torch.cat([ids, ids[:, -1:].expand(-1, 4)], 1)
    mixer, x = make_mixer(spec), make_input(len(doc_ids), TIME + 4)
    assert relative_error(in_pieces(mixer, x, doc_ids, sorted(cuts), quiet), alone(mixer, x, doc_ids)) < 1e-10


@every_mixer
@pytest.mark.parametrize("cuts", [list(range(1, TIME)), [8], [4, 5]], ids=["decoded", "at_a_chunk", "late"])
@pytest.mark.parametrize("quiet", [True, False])
def test_a_boundary_anywhere_in_prefill_and_decode(spec, cuts, quiet):
    mixer, x = make_mixer(spec), make_input(TIME - 1, TIME)
    assert relative_error(in_pieces(mixer, x, EVERY_BOUNDARY, cuts, quiet), alone_at_every_boundary(spec)) < 1e-10


@every_mixer
def test_no_gradient_passes_between_documents(spec):
    """Exactly none, also where one document is far larger than the other."""
    mixer, x = make_mixer(spec), make_input(len(MIXED), TIME)
    x[MIXED == 1] *= 30
    x.requires_grad_()
    y, weights = mixer(x, described(MIXED)), make_input(len(MIXED), TIME, seed=5)
    for document in range(int(MIXED.max()) + 1):
        mine = document == MIXED
        (grad,) = torch.autograd.grad((y * weights)[mine].sum(), x, retain_graph=True)
        assert bool(grad.isfinite().all())
        assert int(grad[~mine].count_nonzero()) == 0, document
        assert int(grad[mine].count_nonzero()) > 0, document


@every_mixer
@pytest.mark.parametrize("cuts", [[], [6], [6, 7, 8]])
def test_a_document_does_not_depend_on_what_stood_before_it(spec, cuts):
    doc_ids = EVERY_BOUNDARY[4:5]  # the second document begins at 5
    mixer, x = make_mixer(spec), make_input(1, TIME)
    changed = torch.where(doc_ids[..., None] == 0, -50 * x.flip(1), x)
    first, second = (in_pieces(mixer, text, doc_ids, cuts, quiet=True)[:, 5:] for text in (x, changed))
    assert relative_error(first, second) < 1e-12


@every_mixer
def test_documents_told_apart_only_from_a_later_piece_on(spec):
    """The first piece knows nothing of documents, as in a plain prefill; the second begins one."""
    mixer, x = make_mixer(spec), make_input(2, TIME)
    doc_ids = (torch.arange(TIME) >= 9).long().expand(2, TIME)
    cache = mixer.new_cache(2, TIME, dtype=x.dtype, device=CPU)
    with torch.no_grad():
        first = mixer(x[:, :6], SequenceInfo.contiguous(2, 6, 0, CPU), cache)
        rest = [mixer(x[:, a:b], described(doc_ids, a, b, quiet=True), cache) for a, b in pairwise([6, 12, 13, TIME])]
    assert relative_error(torch.cat([first, *rest], 1), alone(mixer, x, doc_ids)) < 1e-10
