"""What a forward knows of its columns: masks against a count by hand, indices, and tables that are made once."""

from __future__ import annotations

import itertools

import pytest
import torch

from hybridlm.layers.sequence import SequenceInfo

DEVICE = torch.device("cpu")


def allowed(positions, index, valid, window, span):
    """(T, S) by the definition: a key of the own document, not later, within the window."""
    rows = []
    for place, own, real in zip(positions, index, valid, strict=True):
        first = own - place
        row = [first <= key <= own and (window is None or key > own - window) for key in range(span)]
        rows.append(row if real else [True] * span)
    return torch.tensor(rows)


@pytest.mark.parametrize(("window", "past"), itertools.product([None, 1, 3], [0, 4]))
def test_a_plain_row_sees_its_past(window, past):
    seq = SequenceInfo.contiguous(2, 5, past, DEVICE)
    assert seq.plain
    assert seq.span == past + 5
    assert seq.index[0].tolist() == list(range(past, past + 5))
    want = allowed(seq.positions[0].tolist(), range(past, past + 5), [True] * 5, window, past + 5)
    assert torch.equal(seq.visible(window)[0, 0], want)


@pytest.mark.parametrize("window", [None, 2])
def test_documents_and_padding(window):
    """Two columns of padding, then documents of two and three tokens."""
    positions = torch.tensor([[0, 0, 0, 1, 0, 1, 2]])
    valid = torch.tensor([[False, False, True, True, True, True, True]])
    doc_ids = torch.tensor([[-1, -1, 0, 0, 1, 1, 1]])
    seq = SequenceInfo(positions, valid=valid, doc_ids=doc_ids, longest=5)
    assert not seq.plain
    assert seq.padding is not None
    assert seq.padding.tolist() == [2]
    index = seq.index[0].tolist()
    assert index[2:] == [0, 1, 2, 3, 4]
    mask = seq.visible(window)[0, 0]
    assert torch.equal(mask, allowed(positions[0].tolist(), index, valid[0].tolist(), window, 5))


def test_rows_of_different_lengths_and_a_bounded_cache():
    """The newest token of every row is last, whatever the rows hold."""
    seq = SequenceInfo(torch.tensor([[3], [6]]), past=6, held=torch.tensor([3, 6]))
    assert seq.index.tolist() == [[3], [6]]
    unbounded = seq.visible(None)[:, 0, 0]
    assert unbounded.tolist() == [[True] * 4 + [False] * 3, [True] * 7]
    bounded = seq.visible(4, bounded=3)[:, 0, 0]
    assert bounded.tolist() == [[True] * 4, [True] * 4]


def test_tables_are_made_once():
    seq = SequenceInfo.contiguous(1, 6, 0, DEVICE)
    assert seq.visible(3) is seq.visible(3)
    assert seq.visible(3) is not seq.visible(None)
    assert seq.rotary(8, 100.0, torch.float32)[0] is seq.rotary(8, 100.0, torch.float32)[0]
    assert seq.rotary(8, 100.0, torch.float64)[0].dtype == torch.float64
