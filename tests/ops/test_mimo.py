"""Mamba-3's chunked scan over ranks, its rotation and its gate, with their hand-written backward, against a loop over
the tokens."""

from __future__ import annotations

import pytest
import torch
from recurrences import assert_near, relative_error
from torch import Tensor

from hybridlm.ops import mimo_tiles
from hybridlm.ops.mimo import mimo_scan, untiled
from hybridlm.ops.mimo_gate import mimo_gate, mimo_gate_step

BATCH, HEADS, HEAD_DIM, STATE = 2, 4, 3, 6
NAMES = ("x", "log_decay", "scale", "own", "B", "C", "B_bias", "C_bias", "theta", "mimo_x", "D", "initial_state")
TIMED = ("x", "log_decay", "scale", "own", "B", "C")  # theta too, but its time is the last axis
# Lengths of a row's documents: one boundary at every offset of a chunk, one-token documents alone and several in a
# chunk, a boundary exactly between two chunks, a document of many chunks, and one after another at the last column.
LAYOUTS = [[first, 20 - first] for first in range(1, 9)] + [[1] * 20, [4, 4, 12], [2, 1, 1, 3, 10, 3], [19, 1], [20]]


def starts_of(layouts: list[list[int]], *, first: bool = True) -> Tensor:
    """(B, T) True at the beginning of every document; first: also of each row's first."""
    starts = torch.zeros(len(layouts), sum(layouts[0]), dtype=torch.bool)
    for row, lengths in enumerate(layouts):
        starts[row, [sum(lengths[:i]) for i in range(len(lengths))]] = True
    starts[:, 0] &= first
    return starts


def make_inputs(
    time: int, rank: int = 2, groups: int = 2, n_angles: int = 2, batch: int = BATCH, seed: int = 0
) -> dict[str, Tensor]:
    """Everything the scan takes, and gradients of what it returns."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    return {
        "x": randn(batch, time, HEADS, HEAD_DIM),
        "log_decay": -torch.tensor([0.01, 0.3, 3.0, 30.0], dtype=torch.float64) * rand(batch, time, HEADS),
        "scale": rand(batch, time, HEADS),
        "own": rand(batch, time, HEADS),
        "B": randn(batch, time, rank, groups, STATE),
        "C": randn(batch, time, rank, groups, STATE),
        "B_bias": randn(HEADS, rank, STATE),
        "C_bias": randn(HEADS, rank, STATE),
        "theta": 7 * rand(batch, HEADS, n_angles, time),
        "mimo_x": randn(HEADS, rank, HEAD_DIM),
        "D": randn(HEADS),
        "initial_state": randn(batch, HEADS, HEAD_DIM, STATE),
        "dy": randn(batch, time, rank, HEADS, HEAD_DIM),
        "dstate": randn(batch, HEADS, HEAD_DIM, STATE),
    }


def rotated(v: Tensor, theta: Tensor | None, adjacent: bool) -> Tensor:
    """v (B, R, H, N) with its first pairs multiplied, as complex numbers, by exp(i theta); theta: (B, H, n)."""
    if theta is None:
        return v
    channels = list(v.unbind(-1))
    for i in range(theta.shape[-1]):
        a, b = (2 * i, 2 * i + 1) if adjacent else (i, i + v.shape[-1] // 2)
        turned = torch.complex(channels[a], channels[b]) * torch.polar(
            torch.ones_like(theta[..., i]), theta[..., i]
        ).unsqueeze(1)
        channels[a], channels[b] = turned.real, turned.imag
    return torch.stack(channels, -1)


def token_loop(
    x, log_decay, scale, own, B, C, B_bias, C_bias, theta, mimo_x, D, *, initial_state=None, starts=None, adjacent=False
) -> tuple[Tensor, Tensor]:
    """The equations, one token after another: y (B, T, R, H, P) and the last state (B, H, P, N)."""
    batch, time, heads, width = x.shape
    rank, groups, d_state = B.shape[2:]
    of_head = [h // (heads // groups) for h in range(heads)]
    state = x.new_zeros(batch, heads, width, d_state) if initial_state is None else initial_state
    outputs = []
    for t in range(time):
        angle = None if theta is None else theta[..., t]
        k, c = (
            rotated(v[:, t][:, :, of_head] + bias.transpose(0, 1), angle, adjacent)
            for v, bias in ((B, B_bias), (C, C_bias))
        )
        ranks = [x[:, t] if mimo_x is None else mimo_x[:, r] * x[:, t] for r in range(rank)]
        kept = torch.exp(log_decay[:, t])[..., None, None] * state
        if starts is not None:
            kept = torch.where(starts[:, t, None, None, None], torch.zeros_like(kept), kept)
        write = sum(ranks[r][..., None] * k[:, r, :, None, :] for r in range(rank))
        read = kept + own[:, t, :, None, None] * write
        outputs.append(
            torch.stack([(read * c[:, r, :, None, :]).sum(-1) + D[:, None] * ranks[r] for r in range(rank)], 1)
        )
        state = kept + scale[:, t, :, None, None] * write
    return torch.stack(outputs, 1), state


def scan(*args: Tensor | None, **settings) -> tuple[Tensor, Tensor]:
    """``mimo_scan`` with y as the loop gives it."""
    y, state = mimo_scan(*args, **settings)
    return untiled(y, args[0].shape[1]), state


def run(function, inputs: dict[str, Tensor | None], **settings) -> dict[str, Tensor]:
    """y, the last state, and the gradient of every input that is given, under ``sum(y dy) + sum(state dstate)``."""
    given = {name: inputs.get(name) for name in NAMES}
    given = {name: None if tensor is None else tensor.detach().requires_grad_() for name, tensor in given.items()}
    leaves = {name: tensor for name, tensor in given.items() if tensor is not None}
    y, state = function(*[given[name] for name in NAMES[:-1]], initial_state=given["initial_state"], **settings)
    loss = (y * inputs["dy"]).sum() + (state * inputs["dstate"]).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return {"y": y, "state": state} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def without(inputs: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in inputs.items() if name not in names}


@pytest.mark.parametrize("adjacent", [True, False], ids=["adjacent", "half_split"])
@pytest.mark.parametrize("groups", [1, 2, HEADS])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_scan_and_every_gradient_in_float64(rank, groups, adjacent):
    """Whatever the chunk, also where the text is no multiple of it."""
    inputs = make_inputs(17, rank, groups, n_angles=1 if rank == 2 else 3)
    want = run(token_loop, inputs, adjacent=adjacent)
    for chunk in (1, 3, 16, 64):
        assert_near(run(scan, inputs, adjacent=adjacent, chunk=chunk), want, 1e-10)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize(
    "left_out", [("theta",), ("mimo_x",), ("initial_state",), ("theta", "mimo_x", "initial_state")], ids="_".join
)
def test_what_is_not_given_is_no_rotation_ones_and_zeros(left_out, rank):
    inputs = without(make_inputs(11, rank), *left_out)
    want = run(token_loop, inputs)
    for chunk in (4, 16):
        assert_near(run(scan, inputs, chunk=chunk), want, 1e-10)


@pytest.mark.parametrize("time", [1, 2])
@pytest.mark.parametrize("left_out", [(), ("initial_state",)], ids=["after_a_state", "from_nothing"])
def test_the_shortest_texts(time, left_out):
    got, want = (run(function, without(make_inputs(time), *left_out)) for function in (scan, token_loop))
    if left_out and time == 1:  # nothing came before that could decay
        assert max(float(side.pop("dlog_decay").abs().max()) for side in (got, want)) < 1e-14
    assert_near(got, want, 1e-10)


def test_the_inputs_are_left_as_they_are():
    """Also those of which the tiles are views: one row, one chunk."""
    for time in (1, 4):
        inputs = make_inputs(time, batch=1)
        copies = {name: tensor.clone() for name, tensor in inputs.items()}
        run(scan, inputs, chunk=4)
        run(scan, inputs, chunk=4, starts=torch.ones(1, time, dtype=torch.bool))
        assert all(torch.equal(inputs[name], copies[name]) for name in inputs)


def test_only_the_gradient_of_the_state_is_asked_for():
    inputs = make_inputs(7) | {"dy": torch.zeros(())}

    def state_alone(function):
        return lambda *args, **settings: (torch.zeros(()), function(*args, **settings)[1])

    got, want = run(state_alone(scan), inputs, chunk=3), run(state_alone(token_loop), inputs)
    assert_near(
        {name: got[name] for name in want if name != "y"}, {name: want[name] for name in want if name != "y"}, 1e-10
    )


def test_gradients_flow_through_a_split():
    """The second part's gradient reaches the first through the state between them."""
    inputs = make_inputs(13)

    def in_two(*args: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(NAMES, args, strict=False))
        outputs = []
        for part in (slice(6), slice(6, None)):
            now = {name: tensor[:, part] if name in TIMED else tensor for name, tensor in named.items()}
            now["theta"] = named["theta"][..., part]
            y, initial_state = scan(*now.values(), initial_state=initial_state, chunk=4)
            outputs.append(y)
        return torch.cat(outputs, 1), initial_state

    assert_near(run(in_two, inputs), run(token_loop, inputs), 1e-10)


def test_gradcheck():
    inputs = make_inputs(5, batch=1)
    leaves = [inputs[name].requires_grad_() for name in NAMES]
    starts = torch.tensor([[False, False, True, True, False]])

    def function(*args: Tensor) -> tuple[Tensor, Tensor]:
        return mimo_scan(*args[:-1], initial_state=args[-1], starts=starts, chunk=3)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


# Documents.


@pytest.mark.parametrize("first", [True, False], ids=["new", "going_on"])
@pytest.mark.parametrize("rank", [1, 2])
def test_packed_documents_and_all_gradients_against_the_token_loop(rank, first):
    """Whether each row begins a document or goes on with the one whose state it is given."""
    starts, inputs = starts_of(LAYOUTS, first=first), make_inputs(20, rank, batch=len(LAYOUTS))
    want = run(token_loop, inputs, starts=starts)
    for chunk in (1, 3, 8, 64):
        got = run(scan, inputs, starts=starts, chunk=chunk)
        if first:
            assert int(got["dinitial_state"].count_nonzero()) == 0
        assert_near(got, want, 1e-10)


@pytest.mark.parametrize("block", [1, 100], ids=["of_one_chunk", "of_a_few"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("rank", [1, 2])
def test_blocks_of_chunks_change_nothing(rank, packed, block, monkeypatch):
    """What a long text makes of its chunks: several blocks, the last of them shorter."""
    monkeypatch.setattr(mimo_tiles, "_BLOCK", block)
    layouts = LAYOUTS[-5:-3] if packed else LAYOUTS[-1:] * 2
    settings = {"starts": starts_of(layouts, first=False) if packed else None}
    inputs = make_inputs(20, rank, batch=2)
    assert_near(run(scan, inputs, chunk=3, **settings), run(token_loop, inputs, **settings), 1e-10)


def part_of(inputs: dict[str, Tensor], part: slice) -> dict[str, Tensor]:
    one = {name: tensor[:, part] if name in (*TIMED, "dy") else tensor for name, tensor in inputs.items()}
    return one | {"theta": inputs["theta"][..., part]}


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
@pytest.mark.parametrize("layout", LAYOUTS[3:], ids=str)
@pytest.mark.parametrize("chunk", [8, 64])
def test_each_document_is_what_it_is_alone(chunk, layout, dtype, tolerance):
    """Every output and gradient of every document by itself, relative to its own largest value: also a small one beside
    a large one."""
    inputs = {name: tensor.to(dtype) for name, tensor in make_inputs(20, batch=1).items() if name != "initial_state"}
    inputs["dstate"] *= 0
    inputs["dy"][:, ::3] *= 100
    packed, begin = run(scan, inputs, starts=starts_of([layout]), chunk=chunk), 0
    for length in layout:
        part = slice(begin, begin + length)
        alone, begin = run(scan, part_of(inputs, part), chunk=chunk), begin + length
        for name in ("y", *(f"d{name}" for name in TIMED if name not in ("log_decay", "scale") or length > 1)):
            assert relative_error(packed[name][:, part], alone[name]) <= tolerance, (name, part)


@pytest.mark.parametrize("layout", [[5, 15], [16, 4], [3, 1, 1, 15]], ids=str)
def test_nothing_passes_between_documents(layout):
    """Not a rounding: the gradient of one document's output is exactly zero in every other, before and after."""
    starts, document = starts_of([layout]), starts_of([layout]).cumsum(1)
    inputs = make_inputs(20, batch=1)
    leaves = [inputs[name].requires_grad_() for name in NAMES[:-1]]
    timed = [inputs[name] for name in (*TIMED, "theta")]
    y, state = scan(*leaves, starts=starts, chunk=8)
    for i in range(1, len(layout) + 1):
        grads = torch.autograd.grad((y * inputs["dy"])[document == i].sum(), timed, retain_graph=True)
        for name, grad in zip((*TIMED, "theta"), grads, strict=True):
            by_token = grad.movedim(-1, 1) if name == "theta" else grad
            assert int(by_token[document != i].count_nonzero()) == 0, (name, i)
            assert bool(by_token.isfinite().all()), (name, i)
        assert int(grads[0][document == i].count_nonzero()) > 0
    grads = torch.autograd.grad(
        state.sum(), [tensor for tensor in timed if tensor is not inputs["C"]], allow_unused=True
    )
    of_tokens = [
        grad.movedim(-1, 1) if grad.shape == inputs["theta"].shape else grad for grad in grads if grad is not None
    ]
    assert all(int(grad[document != len(layout)].count_nonzero()) == 0 for grad in of_tokens)


def test_the_decay_of_a_documents_first_token_does_not_matter():
    starts, inputs = starts_of([[5, 3, 12], [9, 1, 10]]), make_inputs(20)
    want = run(scan, inputs, starts=starts, chunk=8)
    assert int(want["dlog_decay"][starts].count_nonzero()) == 0
    inputs["log_decay"][starts] = -1e6
    assert_near(run(scan, inputs, starts=starts, chunk=8), want, 1e-14)


# Precision.


@pytest.mark.parametrize("time", [17, 40])
@pytest.mark.parametrize("rank", [1, 4])
def test_float32(rank, time):
    inputs = {name: tensor.float() for name, tensor in make_inputs(time, rank).items()}
    got = run(scan, inputs, chunk=16)
    assert all(tensor.dtype == torch.float32 for tensor in got.values())
    assert_near(got, run(token_loop, {name: tensor.double() for name, tensor in inputs.items()}), 1e-5)


def test_a_tokens_own_weight_is_not_rounded_into_decays_and_scales():
    """In float32, where a token weighs a billion times more in its own output than in the state."""
    inputs = {name: tensor.float() for name, tensor in make_inputs(20).items()}
    inputs["scale"] *= 1e-9
    inputs["initial_state"] *= 1e-9
    inputs["dstate"] *= 0
    got = run(scan, inputs, chunk=8)
    want = run(token_loop, {name: tensor.double() for name, tensor in inputs.items()})
    for name in ("dlog_decay", "dscale", "down"):
        assert relative_error(got[name], want[name]) < 1e-5, name


@pytest.mark.parametrize("chunk", [8, 64])
def test_decays_that_underflow_leave_no_nan(chunk):
    inputs = make_inputs(20)
    inputs["log_decay"][:, 5:15] = -800.0
    got = run(scan, inputs, chunk=chunk)
    assert all(bool(tensor.isfinite().all()) for tensor in got.values())
    assert_near(got, run(token_loop, inputs), 1e-10)


@pytest.mark.parametrize("documents", [False, True])
def test_autocast_does_not_reach_into_scan_and_gate(documents):
    """Matrix products in bfloat16 would leave three digits: outputs, state and gradients stay the same bit for bit."""
    inputs = {name: tensor.float() for name, tensor in make_inputs(11).items()}
    starts = starts_of([[4, 7], [1, 10]]) if documents else None
    z, weights = inputs["x"] * 2, inputs["mimo_x"]

    def gated(*args: Tensor, **settings) -> tuple[Tensor, Tensor]:
        y, state = mimo_scan(*args, **settings)
        return mimo_gate(y, z, weights, weights).unsqueeze(2), state

    results = []
    for cast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):  # around the backward too
            results.append(run(gated, inputs, starts=starts, chunk=4))
    for name, tensor in results[0].items():
        assert torch.equal(results[1][name], tensor), name


def test_bfloat16_inputs_keep_a_float32_state():
    narrow = ("x", "B", "C")
    inputs = {name: tensor.bfloat16() if name in narrow else tensor.float() for name, tensor in make_inputs(17).items()}
    got = run(scan, inputs, chunk=8)
    want = run(token_loop, {name: tensor.double() for name, tensor in inputs.items()})
    assert got["y"].dtype == got["state"].dtype == torch.float32
    assert all(got[f"d{name}"].dtype == inputs[name].dtype for name in NAMES)
    assert_near(got, want, 2**-7)
    assert relative_error(got["state"], want["state"]) < 1e-5


# The gate.


def gate_by_hand(y: Tensor, z: Tensor, mimo_z: Tensor, mimo_o: Tensor) -> Tensor:
    """y (B, T, R, H, P)."""
    gates = [mimo_z[:, r] * z for r in range(y.shape[2])]
    return sum(mimo_o[:, r] * y[:, :, r] * gates[r] * torch.sigmoid(gates[r]) for r in range(y.shape[2]))


def gate_inputs(time: int, rank: int, chunk: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    shapes = (
        (HEADS, -(-time // chunk), BATCH, rank, chunk, HEAD_DIM),
        (BATCH, time, HEADS, HEAD_DIM),
        *2 * [(HEADS, rank, HEAD_DIM)],
    )
    return [torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize(("time", "chunk"), [(1, 1), (7, 3), (8, 4)])
def test_the_gate_and_its_gradients(time, chunk, rank):
    leaves = gate_inputs(time, rank, chunk)
    upstream = torch.randn(
        BATCH, time, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(4), dtype=torch.float64
    )
    results = []
    for out in (mimo_gate(*leaves), gate_by_hand(untiled(leaves[0], time), *leaves[1:])):
        grads = torch.autograd.grad((out * upstream).sum(), leaves)
        results.append({"out": out} | dict(zip(("dy", "dz", "dmimo_z", "dmimo_o"), grads, strict=True)))
    assert_near(*results, 1e-12)
    if time == 1:
        assert (
            relative_error(
                mimo_gate_step(untiled(leaves[0], 1)[:, 0], leaves[1][:, 0], *leaves[2:]), results[1]["out"][:, 0]
            )
            < 1e-12
        )


# The operators as torch sees them. The dynamic-shape check compiles; once is enough.
QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")
STARTS = torch.tensor([[False, False, True, False, True, True, False], [True] + 6 * [False]])


def laid_out(layout: str) -> list[Tensor]:
    """Float32 inputs, also as views: "split" out of one projection, as the layer does; "time_first" with batch and time
    swapped."""
    inputs = {name: tensor.float() for name, tensor in make_inputs(7).items()}
    if layout == "split":
        parts = torch.cat([inputs[name].flatten(2) for name in ("x", "B", "C")], -1).split([12, 24, 24], -1)
        inputs |= {
            name: part.unflatten(-1, inputs[name].shape[2:]) for name, part in zip(("x", "B", "C"), parts, strict=True)
        }
    elif layout == "time_first":
        inputs |= {name: inputs[name].transpose(0, 1).contiguous().transpose(0, 1) for name in TIMED}
    return [inputs[name] for name in NAMES]


every_layout = pytest.mark.parametrize("layout", ["contiguous", "split", "time_first"])


@every_layout
def test_opcheck(layout):
    """Schema, fake kernel (shapes, strides, dtypes) and autograd agree with what the op does, also for inputs that are
    views."""
    leaves = [tensor.detach().requires_grad_() for tensor in laid_out(layout)]
    whole = "ALL" if layout == "contiguous" else QUICK
    torch.library.opcheck(torch.ops.hybridlm.mimo_scan.default, (*leaves, STARTS, False, 3), test_utils=whole)
    little = [
        None if name in ("theta", "mimo_x", "initial_state") else leaf for name, leaf in zip(NAMES, leaves, strict=True)
    ]
    torch.library.opcheck(torch.ops.hybridlm.mimo_scan.default, (*little, None, True, 3), test_utils=QUICK)


@every_layout
@pytest.mark.parametrize("given", ["little", "everything"])
def test_opcheck_of_the_backward(layout, given):
    tensors, starts = laid_out(layout), STARTS
    if given == "little":
        starts = tensors[8] = tensors[9] = tensors[11] = None
    y, states = torch.ops.hybridlm.mimo_scan(*tensors, starts, False, 3)
    dstates = None if given == "little" else torch.ones_like(states)
    args = (torch.ones_like(y), dstates, *tensors[:-1], starts, states, False, 3)
    torch.library.opcheck(torch.ops.hybridlm.mimo_scan_backward.default, args, test_utils=QUICK)


@every_layout
def test_views_change_nothing(layout):
    given = dict(zip(NAMES, laid_out(layout), strict=True)) | {
        name: make_inputs(7)[name].float() for name in ("dy", "dstate")
    }
    plain = {name: tensor.clone().contiguous() for name, tensor in given.items()}
    assert_near(run(scan, given, chunk=3, starts=STARTS), run(scan, plain, chunk=3, starts=STARTS), 1e-6)


def test_opcheck_of_the_gate():
    leaves = gate_inputs(7, 2, 3)
    torch.library.opcheck(torch.ops.hybridlm.mimo_gate.default, tuple(leaves))
    out = torch.ones(BATCH, 7, HEADS, HEAD_DIM, dtype=torch.float64)
    torch.library.opcheck(
        torch.ops.hybridlm.mimo_gate_backward.default, (out, *(leaf.detach() for leaf in leaves)), test_utils=QUICK
    )
