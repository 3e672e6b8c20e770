"""Documents in one row of the scan: each is what it would be alone, and nothing passes between them, in either
direction."""

from __future__ import annotations

import pytest
import torch
from recurrences import assert_near, relative_error
from token_loop import scan_loop
from torch import Tensor

from hybridlm.ops.ssd import scan, ssd

HEADS, HEAD_DIM, STATE, CHUNK = 4, 3, 5, 8
TIMED = ("x", "log_decay", "scale", "B", "C")
# Lengths of a row's documents: one boundary at every offset of a chunk, one-token documents alone and several in a
# chunk, a boundary exactly between two chunks, a document of many chunks, and one after another at the last column.
LAYOUTS = [[first, 40 - first] for first in range(1, 17)] + [
    [1] * 40,
    [8, 8, 24],
    [2, 1, 1, 3, 30, 3],
    [39, 1],
    [7, 1, 1, 31],
    [40],
]


def starts_of(layouts: list[list[int]], *, first: bool = True) -> Tensor:
    """(B, T) True at the beginning of every document; first: also of each row's first."""
    starts = torch.zeros(len(layouts), sum(layouts[0]), dtype=torch.bool)
    for row, lengths in enumerate(layouts):
        starts[row, [sum(lengths[:i]) for i in range(len(lengths))]] = True
    starts[:, 0] &= first
    return starts


def make_inputs(batch: int, time: int, groups: int = 2, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    rates = -torch.tensor([0.01, 0.3, 3.0, 30.0], dtype=torch.float64)
    tensors = {
        "x": torch.randn(batch, time, HEADS, HEAD_DIM, generator=g, dtype=torch.float64),
        "log_decay": rates * torch.rand(batch, time, HEADS, generator=g, dtype=torch.float64),
        "scale": torch.rand(batch, time, HEADS, generator=g, dtype=torch.float64),
        "B": torch.randn(batch, time, groups, STATE, generator=g, dtype=torch.float64),
        "C": torch.randn(batch, time, groups, STATE, generator=g, dtype=torch.float64),
        "D": torch.randn(HEADS, generator=g, dtype=torch.float64),
        "initial_state": torch.randn(batch, HEADS, HEAD_DIM, STATE, generator=g, dtype=torch.float64),
    }
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def upstream(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Fixed gradients of y and of the final state."""
    g = torch.Generator().manual_seed(9)
    like = (
        inputs["x"],
        inputs["initial_state"]
        if "initial_state" in inputs
        else inputs["x"].new_empty(len(inputs["x"]), HEADS, HEAD_DIM, STATE),
    )
    dy, dstate = (torch.randn(tensor.shape, generator=g, dtype=torch.float64).to(tensor.dtype) for tensor in like)
    return dy, dstate


def run(function, inputs: dict[str, Tensor], dy: Tensor, dstate: Tensor, **settings) -> dict[str, Tensor]:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    y, state = function(**leaves, **settings)
    grads = torch.autograd.grad((y * dy).sum() + (state * dstate).sum(), list(leaves.values()), materialize_grads=True)
    return {"y": y, "state": state} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def without(inputs: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in inputs.items() if name not in names}


@pytest.mark.parametrize("left_out", [(), ("initial_state",)])
@pytest.mark.parametrize("groups", [1, 2, HEADS])
@pytest.mark.parametrize("first", [True, False], ids=["new", "going_on"])
def test_packed_documents_and_all_gradients_against_the_token_loop(first, groups, left_out):
    """Whether each row begins a document or goes on with the one whose state it is given."""
    starts, inputs = starts_of(LAYOUTS, first=first), without(make_inputs(len(LAYOUTS), 40, groups), *left_out)
    want = run(scan_loop, inputs, *upstream(inputs), starts=starts)
    if first and "initial_state" in inputs:
        assert int(want["dinitial_state"].count_nonzero()) == 0
    for chunk in (1, 3, CHUNK, 64):
        got = run(scan, inputs, *upstream(inputs), starts=starts, chunk=chunk)
        if first and "initial_state" in inputs:
            assert int(got["dinitial_state"].count_nonzero()) == 0
        assert_near(got, want, 1e-10)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("chunk", [CHUNK, 64])
def test_each_document_is_what_it_is_alone(chunk, layout, dtype, tolerance):
    """Every output and gradient of every document by itself, relative to its own largest value: also a small one beside
    a large one."""
    inputs = without(make_inputs(1, 40, dtype=dtype), "initial_state")
    dy, dstate = upstream(inputs)
    starts = starts_of([layout])
    packed = run(scan, inputs, dy, dstate, starts=starts, chunk=chunk)
    begin = 0
    for length in layout:
        part = slice(begin, begin + length)
        begin += length
        one = {name: tensor[:, part] if name in TIMED else tensor for name, tensor in inputs.items()}
        alone = run(
            scan,
            one,
            dy[:, part],
            dstate if begin == 40 else torch.zeros_like(dstate),
            starts=starts[:, part],
            chunk=chunk,
        )
        for name in ("y", *(f"d{name}" for name in TIMED)):
            assert relative_error(packed[name][:, part], alone[name]) <= tolerance, (name, part)
        if begin == 40:
            assert relative_error(packed["state"], alone["state"]) <= tolerance


@pytest.mark.parametrize("layout", [[5, 35], [16, 24], [3, 1, 1, 35]], ids=str)
def test_nothing_passes_between_documents(layout):
    """Not a rounding: the gradient of one document's output is exactly zero in every other, before and after."""
    starts, document = starts_of([layout]), starts_of([layout]).cumsum(1)
    leaves = {name: tensor.requires_grad_() for name, tensor in make_inputs(1, 40).items()}
    y, state = scan(**leaves, starts=starts, chunk=CHUNK)
    dy = upstream(leaves)[0]
    for i in range(1, len(layout) + 1):
        grads = torch.autograd.grad((y * dy)[document == i].sum(), [leaves[name] for name in TIMED], retain_graph=True)
        for name, grad in zip(TIMED, grads, strict=True):
            assert int(grad[document != i].count_nonzero()) == 0, (name, i)
            assert bool(grad[document == i].isfinite().all()), (name, i)
        assert int(grads[0][document == i].count_nonzero()) > 0
    grads = torch.autograd.grad(state.sum(), [leaves[name] for name in TIMED if name != "C"], allow_unused=True)
    assert all(grad is None or int(grad[document != len(layout)].count_nonzero()) == 0 for grad in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("first_decays", ["much", "nothing"])
def test_large_decays_beside_small_ones_stay_finite_and_exact(first_decays, dtype):
    """Running sums of -100,000 in one document and of -1 in the next: no overflow, and no rounding carried over."""
    starts, inputs = starts_of([[5, 3, 20, 12]]), without(make_inputs(1, 40, dtype=dtype), "initial_state")
    large = (starts.cumsum(1) % 2 == (1 if first_decays == "much" else 0))[..., None]
    inputs["log_decay"] = torch.where(large, inputs["log_decay"] * 1e4 - 1e3, inputs["log_decay"] / 30)
    got = run(scan, inputs, *upstream(inputs), starts=starts, chunk=64)
    assert all(bool(tensor.isfinite().all()) for tensor in got.values())
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    assert_near(
        got,
        run(scan_loop, wide, *(tensor.double() for tensor in upstream(inputs)), starts=starts),
        1e-10 if dtype == torch.float64 else 1e-5,
    )


def test_the_decay_of_a_documents_first_token_does_not_matter():
    starts, inputs = starts_of([[5, 3, 20, 12]]), make_inputs(1, 40)
    want = run(scan, inputs, *upstream(inputs), starts=starts, chunk=CHUNK)
    assert int(want["dlog_decay"][starts].count_nonzero()) == 0
    inputs["log_decay"][starts] = -1e6
    assert_near(run(scan, inputs, *upstream(inputs), starts=starts, chunk=CHUNK), want, 1e-14)


def test_no_start_anywhere_is_no_documents():
    inputs = make_inputs(2, 40)
    nowhere = torch.zeros(2, 40, dtype=torch.bool)
    assert_near(
        run(scan, inputs, *upstream(inputs), starts=nowhere, chunk=CHUNK),
        run(scan, inputs, *upstream(inputs), chunk=CHUNK),
        1e-13,
    )


def test_token_by_token_is_the_whole():
    """Decode: the state is dropped in the rows where a document begins and kept in the others."""
    starts, inputs = starts_of(LAYOUTS, first=False), make_inputs(len(LAYOUTS), 40)
    want, last = scan(**inputs, starts=starts, chunk=CHUNK)
    state, outputs = inputs.pop("initial_state"), []
    for t in range(40):
        now = {name: tensor[:, t : t + 1] if name in TIMED else tensor for name, tensor in inputs.items()}
        y, state = scan(**now, initial_state=state, starts=starts[:, t : t + 1])
        outputs.append(y)
    assert relative_error(torch.cat(outputs, 1), want) < 1e-12
    assert relative_error(state, last) < 1e-12


@pytest.mark.parametrize("begins", [True, False])
def test_gradients_of_one_token(begins):
    inputs, starts = make_inputs(2, 1), torch.tensor([[begins], [False]])
    got, want = (run(function, inputs, *upstream(inputs), starts=starts) for function in (scan, scan_loop))
    assert_near(got, want, 1e-12)
    assert (int(got["dinitial_state"][0].count_nonzero()) == 0) == begins


def test_mamba2s_scan_passes_documents_on():
    inputs, starts = make_inputs(2, 40), starts_of([[11, 29], [16, 24]])
    A = -torch.tensor([0.1, 1.0, 3.0, 9.0], dtype=torch.float64)
    dt = inputs["scale"]
    inputs |= {"log_decay": dt * A}
    want = scan_loop(**inputs, starts=starts)
    got = ssd(
        inputs["x"],
        dt,
        A,
        inputs["B"],
        inputs["C"],
        inputs["D"],
        initial_state=inputs["initial_state"],
        starts=starts,
        chunk=CHUNK,
    )
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 1e-12
