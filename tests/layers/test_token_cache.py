"""Caches of tokens, and the masks that go with them, against rows kept as Python lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybridlm.layers.cache import TokenCache, after_padding
from hybridlm.layers.sequence import SequenceInfo
from hybridlm.model.cache import ModelCache
from hybridlm.model.columns import padding_first, sequence_info

CPU = torch.device("cpu")
ROWS = 3


class Rows:
    """A cache of one number per token, fed as the model feeds it, and what must be in it: a list of (number, document)
    for each row."""

    def __init__(self, max_len: int, window: int | None, dtype: torch.dtype = torch.float64) -> None:
        self.window = window
        self.layer = TokenCache({"a": (2,), "b": (1, 3), "c": (0,)}, ROWS, max_len, window, dtype=dtype, device=CPU)
        self.cache = ModelCache([self.layer], ROWS, CPU)
        self.rows: list[list[tuple[float, int]]] = [[], [], []]
        self.next = 1.0

    def feed(self, length: int, valid: Tensor | None = None, doc_ids: Tensor | None = None) -> None:
        """Appends numbers that never came before and compares what every token may look at."""
        numbers = torch.arange(length * ROWS, dtype=torch.float64).view(ROWS, length) + self.next
        self.next += length * ROWS
        seq = sequence_info(length, self.cache, doc_ids, valid, numbers)
        new = {
            "a": numbers[..., None].expand(-1, -1, 2),
            "b": -numbers[..., None, None].expand(-1, -1, 1, 3),
            "c": numbers.new_zeros(ROWS, length, 0),
        }
        seen = self.layer.append(new, seq)
        self.cache.advance(seq)
        width = seen["a"].shape[1]
        assert seen["c"].shape == (ROWS, width, 0)
        assert torch.equal(seen["b"], -seen["a"][..., :1, None].expand(-1, -1, 1, 3))
        mask = None if seq.plain else seq.visible(self.window, self.layer.bounded)[:, 0]
        for row in range(ROWS):
            for column in range(length):
                if valid is not None and not valid[row, column]:
                    assert bool(mask[row, column].all()), "no softmax may be empty"
                    continue
                if doc_ids is not None:
                    document = int(doc_ids[row, column])
                else:
                    document = self.rows[row][-1][1] if self.rows[row] else 0
                self.rows[row].append((float(numbers[row, column]), document))
                want = [number for number, its in self.rows[row] if its == document][-(self.window or 99) :]
                if mask is None:  # the columns up to the token's own, within the window
                    mine = seen["a"][row, : width - length + column + 1, 0][-(self.window or 99) :]
                else:
                    mine = seen["a"][row, mask[row, column], 0]
                assert mine.tolist() == want


SETTINGS = [(40, None), (40, 1), (40, 3), (40, 8), (40, 60), (60, 60)]


@pytest.mark.parametrize(("max_len", "window"), SETTINGS)
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    seed=st.integers(0, 10_000),
    padded=st.booleans(),
    documents=st.booleans(),
)
def test_every_token_sees_what_it_may(max_len, window, lengths, seed, padded, documents):
    rows, g, current = (
        Rows(max_len, window),
        torch.Generator().manual_seed(seed),
        torch.zeros(ROWS, 1, dtype=torch.long),
    )
    for length in lengths:
        valid = doc_ids = None
        if padded and bool(torch.rand((), generator=g) < 0.8):
            valid = torch.arange(length) >= torch.randint(length + 1, (ROWS, 1), generator=g)
        if documents and bool(torch.rand((), generator=g) < 0.7):
            begins = torch.rand(ROWS, length, generator=g) < 0.3
            doc_ids = current + (begins if valid is None else begins & valid).long().cumsum(1)
            current = doc_ids[:, -1:]
        else:  # an empty row begins document 0, the others go on with theirs
            current = torch.where(rows.cache.lengths[:, None] > 0, current, 0)
        rows.feed(length, valid, doc_ids)
    assert rows.cache.lengths.tolist() == [len(row) for row in rows.rows]
    kept = rows.layer.tensors()["a"][..., 0]
    for row, held in zip(rows.rows, kept.tolist(), strict=True):
        numbers = [number for number, _ in row]
        if rows.layer.bounded is None:
            assert held == numbers + [0.0] * (max_len - len(numbers)), (
                "a token stands at its index, nothing behind the last"
            )
        else:
            newest = numbers[len(numbers) - min(len(numbers), window - 1) :]
            assert held == [0.0] * (window - 1 - len(newest)) + newest, (
                "the newest token stands last, nothing before the first"
            )


def test_a_plain_forward_is_told_of_the_tokens_alone():
    """No column stands before the first token, so that no mask is needed."""
    rows = Rows(40, 8)
    for length, columns in [(3, 3), (2, 5), (1, 6), (6, 12), (9, 16), (1, 8)]:
        seq = SequenceInfo.contiguous(ROWS, length, rows.cache.past, CPU)
        seen = rows.layer.append(
            {name: torch.ones(ROWS, length, *tensor.shape[2:]) for name, tensor in rows.layer.tensors().items()}, seq
        )
        rows.cache.advance(seq)
        assert seen["a"].shape[1] == columns


@pytest.mark.parametrize("window", [None, 4])
def test_dtypes(window):
    """What is seen has the new tokens' dtype; what a row keeps is not rounded on its way through a narrower forward."""
    layer = TokenCache({"a": (1,)}, 2, 10, window, dtype=torch.float64, device=CPU)
    exact = torch.full((2, 3, 1), 1 / 3, dtype=torch.float64)
    layer.append({"a": exact}, SequenceInfo.contiguous(2, 3, 0, CPU))
    valid = torch.tensor([[False], [True]])
    seen = layer.append(
        {"a": exact[:, :1].bfloat16()}, SequenceInfo(torch.tensor([[3], [3]]), 3, valid=valid, longest=4)
    )
    assert seen["a"].dtype == torch.bfloat16
    assert layer.tensors()["a"].dtype == torch.float64
    assert layer.tensors()["a"][0].count_nonzero() == 3
    assert bool((layer.tensors()["a"][0][layer.tensors()["a"][0] != 0] == 1 / 3).all())


def test_what_does_not_fit_is_refused():
    rows = Rows(5, None)
    rows.feed(4)
    with pytest.raises(ValueError, match="holds 5 tokens, 6 are needed"):
        rows.feed(2)
    rows.feed(2, torch.tensor([[False, True]] * ROWS))
    with pytest.raises(ValueError, match="holds 5 tokens, 6 are needed"):
        rows.feed(1, torch.tensor([[True], [False], [False]]))


@pytest.mark.parametrize("width", [0, 1, 3])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_past_moves_up_to_the_first_token(width, length):
    """Each row is [zeros of the padding, past, tokens], for every width of padding."""
    rows = length + 1
    state = torch.arange(1.0, rows * width + 1).view(rows, width, 1)
    new = -torch.arange(1.0, rows * length + 1).view(rows, length, 1)
    joined = after_padding(state, new, torch.arange(rows))
    for row in range(rows):
        assert joined[row, :, 0].tolist() == [0.0] * row + state[row, :, 0].tolist() + new[row, row:, 0].tolist()
    assert torch.equal(after_padding(state, new, None), torch.cat([state, new], 1))


def test_padding_goes_to_the_left_and_back():
    valid = torch.tensor([[True, False, True, True, False], [False] * 5, [True] * 5])
    order, back = padding_first(valid)
    columns = torch.arange(5).expand(3, 5)
    assert order.tolist() == [[1, 4, 0, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert torch.equal(columns.gather(1, order).gather(1, back), columns)
