"""Padding at the left of rows: it changes no state, influences no token, and its own output is finite. Widths differ
from row to row."""

from __future__ import annotations

import pytest
import torch
from mixer_specs import CPU, assert_same, every_mixer, forward, make_input, make_mixer
from recurrences import document_by_document, relative_error
from torch import Tensor

from hybridlm.layers.mixer import Mixer
from hybridlm.model.cache import NO_DOCUMENT, ModelCache
from hybridlm.model.columns import sequence_info

TIME = 17
WIDTHS = [0, 3, 16, 9, 17]  # columns of padding of each row; the last holds no token
# Columns of a forward, and each row's padding in it: rows pause, begin late, and end early.
PIECES = [
    (6, [0, 2, 6, 5]),
    (1, [0, 1, 1, 0]),
    (9, [3, 0, 9, 9]),
    (1, [0, 0, 0, 1]),
    (1, [0, 0, 0, 0]),
    (7, [0, 7, 1, 2]),
]

LONGEST = max(
    sum(columns - widths[row] for columns, widths in PIECES) for row in range(4)
)  # tokens of a row; padding takes no place


def tokens_of(columns: int, widths: list[int]) -> Tensor:
    """(B, columns) True where there is a token."""
    return torch.arange(columns) >= torch.tensor(widths)[:, None]


class Rows:
    """One mixer with a cache, fed as the model feeds it."""

    def __init__(self, mixer: Mixer, batch: int, max_len: int, dtype: torch.dtype = torch.float64) -> None:
        self.mixer = mixer
        self.cache = ModelCache([mixer.new_cache(batch, max_len, dtype=dtype, device=CPU)], batch, CPU)

    def feed(self, x: Tensor, valid: Tensor | None = None, doc_ids: Tensor | None = None) -> Tensor:
        seq = sequence_info(x.shape[1], self.cache, doc_ids, valid, x[..., 0])
        with torch.no_grad():
            y = self.mixer(x, seq, self.cache.layers[0])
        self.cache.advance(seq)
        return y

    def states(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.cache.layers[0].tensors().items()}


def padded_forward(mixer: Mixer, x: Tensor, valid: Tensor) -> Tensor:
    return mixer(x, sequence_info(x.shape[1], None, None, valid, x[..., 0]))


@every_mixer
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
def test_a_padded_row_is_the_row_without_padding(spec, dtype, tolerance):
    """Output and every gradient, without a cache and against float64; padding itself receives none."""
    valid, results = tokens_of(TIME, WIDTHS), []
    for padded in (True, False):
        kind = dtype if padded else torch.float64
        mixer = make_mixer(spec, kind)
        x, weights = (make_input(len(WIDTHS), TIME, kind, seed=seed) for seed in (1, 5))
        leaves = {"x": x.requires_grad_(), **dict(mixer.named_parameters())}
        if padded:
            whole = padded_forward(mixer, x, valid)
            assert bool(whole.isfinite().all())
            y = whole[valid]
        else:
            y = torch.cat(
                [forward(mixer, row[None, width:])[0] for row, width in zip(x, WIDTHS, strict=True) if width < TIME]
            )
        grads = torch.autograd.grad((y * weights[valid]).sum(), list(leaves.values()))
        assert int(grads[0][~valid].count_nonzero()) == 0
        results.append({"y": y} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)})
    assert_same(*results, tolerance)


@every_mixer
def test_what_stands_in_padding_does_not_matter(spec):
    """Neither to the tokens nor to any state, in a first forward and in a later one."""
    mixer, x = make_mixer(spec), make_input(len(WIDTHS), TIME)
    valid = tokens_of(TIME, WIDTHS)
    other = torch.where(valid[..., None], x, -100 * x.flip(1) + 1)
    results = []
    for text in (x, other):
        rows = Rows(mixer, len(WIDTHS), TIME + 5)
        results.append(
            [
                rows.feed(text, valid)[valid],
                rows.feed(text[:, -5:], valid[:, -5:])[valid[:, -5:]],
                *rows.states().values(),
            ]
        )
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@every_mixer
def test_rows_of_different_lengths_in_pieces(spec):
    """Every row is its own text in one go, wherever it paused."""
    mixer, rows = make_mixer(spec), Rows(make_mixer(spec), 4, LONGEST)
    texts: list[list[Tensor]] = [[], [], [], []]
    outputs: list[list[Tensor]] = [[], [], [], []]
    for i, (columns, widths) in enumerate(PIECES):
        x = make_input(4, columns, seed=10 + i)
        y = rows.feed(x, tokens_of(columns, widths) if any(widths) else None)
        assert bool(y.isfinite().all())
        for row, width in enumerate(widths):
            texts[row].append(x[row, width:])
            outputs[row].append(y[row, width:])
    for text, output in zip(texts, outputs, strict=True):
        assert relative_error(torch.cat(output), forward(mixer, torch.cat(text)[None])[0]) < 1e-10


@every_mixer
@pytest.mark.parametrize("columns", [1, 3, TIME])
def test_a_row_that_is_all_padding_keeps_its_state_bit_for_bit(spec, columns):
    """A row that has ended, and one that has not begun, beside one that goes on."""
    rows = Rows(make_mixer(spec), 3, 9 + columns)
    rows.feed(make_input(3, 9), tokens_of(9, [0, 2, 9]))
    before = rows.states()
    rows.feed(make_input(3, columns, seed=2), tokens_of(columns, [0, columns, columns]))
    for name, tensor in rows.states().items():
        assert torch.equal(tensor[1:], before[name][1:]), name
        assert tensor.numel() == 0 or not torch.equal(tensor[0], before[name][0]), name


@every_mixer
def test_padding_in_float32_keeps_the_state_too(spec):
    rows = Rows(make_mixer(spec, torch.float32), 2, 12, torch.float32)
    rows.feed(make_input(2, 9, torch.float32), tokens_of(9, [4, 0]))
    before = rows.states()
    for _ in range(3):
        rows.feed(make_input(2, 2, torch.float32, seed=2), tokens_of(2, [2, 1]))
    for name, tensor in rows.states().items():
        assert torch.equal(tensor[0], before[name][0]), name


@every_mixer
@pytest.mark.parametrize(
    "pieces",
    [PIECES, PIECES[2:3], [(1, [i % 2, i % 3 // 2, 0, 1]) for i in range(14)]],
    ids=["pieces", "whole", "decoded"],
)
def test_documents_and_padding_together(spec, pieces):
    """Documents begin anywhere in rows that pause anywhere."""
    mixer, rows = make_mixer(spec), Rows(make_mixer(spec), 4, LONGEST)
    streams = [
        [i for i, length in enumerate(row) for _ in range(length)] for row in ([3, 1, 6, 15], [8, 8, 9], [1] * 25, [25])
    ]
    texts: list[list[Tensor]] = [[], [], [], []]
    outputs: list[list[Tensor]] = [[], [], [], []]
    taken = [0, 0, 0, 0]
    for i, (columns, widths) in enumerate(pieces):
        x, valid, doc_ids = (
            make_input(4, columns, seed=10 + i),
            tokens_of(columns, widths),
            torch.full((4, columns), NO_DOCUMENT),
        )
        for row, width in enumerate(widths):
            doc_ids[row, width:] = torch.tensor(streams[row][taken[row] : taken[row] + columns - width])
            taken[row] += columns - width
        y = rows.feed(x, valid, doc_ids)
        for row, width in enumerate(widths):
            texts[row].append(x[row, width:])
            outputs[row].append(y[row, width:])
    for row in range(4):
        if taken[row]:
            text, doc_ids = torch.cat(texts[row])[None], torch.tensor([streams[row][: taken[row]]])
            with torch.no_grad():
                want = document_by_document(lambda document: forward(mixer, document), text, doc_ids)
            assert relative_error(torch.cat(outputs[row])[None], want) < 1e-10
