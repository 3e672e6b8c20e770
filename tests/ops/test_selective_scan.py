"""Mamba-1's chunked scan and its hand-written backward against the recurrence, token by token in float64."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from recurrences import assert_near, relative_error
from selective_scan_loop import BATCH, CHANNELS, NAMES, STATE, TIMED, make_inputs, run, token_loop
from torch import Tensor

from hybridlm.ops import selective_scan_blocks
from hybridlm.ops.selective_scan import selective_scan

LENGTHS = (1, 2, 31, 32, 33, 70)
CHUNKS = (1, 3, 32, 64)


@pytest.fixture(params=["one block", "blocks of many chunks", "blocks of few chunks", "blocks of one chunk"])
def blocks(request, monkeypatch):
    """How much of the text is worked off together: everything, or so many chunks of 24 states that blocks end within
    rows and chunks."""
    steps = {"one block": 1 << 17, "blocks of many chunks": 7, "blocks of few chunks": 2, "blocks of one chunk": 1}[
        request.param
    ]
    monkeypatch.setattr(selective_scan_blocks, "_STEP", steps * CHANNELS * STATE)


@cache
def expected(time: int) -> dict[str, Tensor]:
    return run(token_loop, make_inputs(time))


@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.usefixtures("blocks")
def test_scan_and_all_gradients_in_float64(chunk, time):
    assert_near(run(selective_scan, make_inputs(time), chunk=chunk), expected(time), 1e-10)


@pytest.mark.parametrize("batch", [1, 2, 5, 8])
@pytest.mark.usefixtures("blocks")
def test_any_number_of_rows(batch):
    inputs = make_inputs(50, batch)
    assert_near(run(selective_scan, inputs, chunk=8), run(token_loop, inputs), 1e-10)


@pytest.mark.parametrize("time", [1, 33])
def test_without_an_initial_state_it_is_zero(time):
    inputs = make_inputs(time)
    del inputs["initial_state"]
    got, want = run(selective_scan, inputs, chunk=8), run(token_loop, inputs)
    if time == 1:  # nothing is there that could decay
        assert max(float(side.pop("dA").abs().max()) for side in (got, want)) == 0
    assert_near(got, want, 1e-10)


@pytest.mark.parametrize(("time", "chunk"), [(70, 32), (70, 1), (33, 64), (1, 32)])
def test_float32(chunk, time):
    inputs = {name: tensor.float() for name, tensor in make_inputs(time).items()}
    got = run(selective_scan, inputs, chunk=chunk)
    want = run(token_loop, {name: tensor.double() for name, tensor in inputs.items()})
    assert all(tensor.dtype == torch.float32 for tensor in got.values())
    assert_near(got, want, 1e-5)


@pytest.mark.parametrize("time", [1, 33])
def test_bfloat16_inputs_keep_a_float32_state(time):
    """Only what leaves in bfloat16 is rounded: the state is as exact as from float32 inputs. Autocast does not change
    that."""
    inputs = make_inputs(time)
    inputs["dy"] = inputs["dy"].bfloat16().double()  # as it arrives at an output in bfloat16
    for name in NAMES:
        inputs[name] = inputs[name].bfloat16() if name in ("x", "B", "C") else inputs[name].float()
    want = run(token_loop, {name: tensor.double() for name, tensor in inputs.items()})
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            got = run(selective_scan, inputs, chunk=8)
        assert got["y"].dtype == got["dx"].dtype == got["dB"].dtype == got["dC"].dtype == torch.bfloat16
        for name in ("state", "ddt", "dA", "dD", "dinitial_state"):
            assert got[name].dtype == torch.float32
            assert relative_error(got[name], want[name]) < 1e-5, name
        for name in ("y", "dx", "dB", "dC"):
            assert relative_error(got[name], want[name]) < 2**-7, name


@pytest.mark.parametrize("time", [1, 40])
def test_autocast_leaves_a_float32_scan_alone(time):
    inputs = {name: tensor.float() for name, tensor in make_inputs(time).items()}
    want = run(selective_scan, inputs, chunk=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(selective_scan, inputs, chunk=8)
    assert all(torch.equal(got[name], want[name]) for name in want)


# Decays at both ends.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("chunk", [3, 32])
@pytest.mark.usefixtures("blocks")
def test_strong_decay_leaves_no_nan(chunk, dtype):
    """dt A about -50 from token to token, and -50,000 in places: products of decays are zero in either dtype."""
    inputs = make_inputs(70)
    inputs["A"] = -(0.5 + torch.rand(CHANNELS, STATE, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    inputs["dt"][:, 5:60] = 50.0
    inputs["dt"][1, 30] = 50_000.0
    inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    got = run(selective_scan, inputs, chunk=chunk)
    want = run(token_loop, {name: tensor.double() for name, tensor in inputs.items()})
    assert all(bool(tensor.isfinite().all()) for tensor in got.values())
    assert_near(got, want, 1e-10 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("dt", [1e-6, 1e-30])
def test_tiny_steps(dt):
    """Next to nothing is written or forgotten: the initial state stays, and gradients with respect to dt and A are
    right."""
    inputs = {name: tensor.float() for name, tensor in make_inputs(70).items()}
    inputs["dt"] = torch.full_like(inputs["dt"], dt)
    got = run(selective_scan, inputs, chunk=32)
    assert all(bool(tensor.isfinite().all()) for tensor in got.values())
    assert_near(got, run(token_loop, {name: tensor.double() for name, tensor in inputs.items()}), 1e-5)


def test_a_long_row_of_small_decays_keeps_its_digits():
    """2,000 tokens at the slowest rates that are drawn, in float32: nothing accumulates but the state."""
    g = torch.Generator().manual_seed(0)
    inputs = make_inputs(2000, batch=1)
    inputs["dt"] = torch.rand(1, 2000, CHANNELS, generator=g, dtype=torch.float64) * 1e-3
    inputs["A"] = -torch.arange(1, STATE + 1, dtype=torch.float64).expand(CHANNELS, STATE).contiguous()
    inputs = {name: tensor.float() for name, tensor in inputs.items()}
    want = run(token_loop, {name: tensor.double() for name, tensor in inputs.items()})
    assert_near(run(selective_scan, inputs, chunk=32), want, 1e-5)


# Cuts.


@pytest.mark.parametrize("cut", [1, 7, 16, 39])
def test_any_cut_is_the_whole(cut):
    """The second part's gradient reaches the first through the state between them; a part of one token is the decode
    step."""

    def in_two(x, dt, A, B, C, D, initial_state):
        y1, middle = selective_scan(
            x[:, :cut], dt[:, :cut], A, B[:, :cut], C[:, :cut], D, initial_state=initial_state, chunk=8
        )
        y2, last = selective_scan(x[:, cut:], dt[:, cut:], A, B[:, cut:], C[:, cut:], D, initial_state=middle, chunk=8)
        return torch.cat([y1, y2], 1), last

    inputs = make_inputs(40)
    assert_near(run(in_two, inputs), run(token_loop, inputs), 1e-10)


def test_decoding_token_by_token_is_the_scan():
    inputs = {name: tensor for name, tensor in make_inputs(20).items() if name not in ("dy", "dstate")}
    starts = torch.zeros(BATCH, 20, dtype=torch.bool)
    starts[0, 7] = starts[1, 0] = starts[2, 19] = True
    y, final = selective_scan(**inputs, starts=starts, chunk=8)
    state, line = inputs.pop("initial_state"), []
    for t in range(20):
        token = {name: tensor[:, t : t + 1] if name in TIMED else tensor for name, tensor in inputs.items()}
        y_t, state = selective_scan(**token, initial_state=state, starts=starts[:, t : t + 1])
        line.append(y_t)
    assert relative_error(torch.cat(line, 1), y) < 1e-12
    assert relative_error(state, final) < 1e-12


# The operator.


@pytest.mark.parametrize("time", [1, 7])
def test_gradcheck(time):
    g = torch.Generator().manual_seed(0)
    shapes = {"x": (2, time, 2), "B": (2, time, 2), "C": (2, time, 2), "D": (2,), "initial_state": (2, 2, 2)}
    leaves = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    leaves["dt"] = torch.rand(2, time, 2, generator=g, dtype=torch.float64) + 0.1
    leaves["A"] = -0.1 - torch.rand(2, 2, generator=g, dtype=torch.float64)
    ordered = [leaves[name].requires_grad_() for name in NAMES]
    starts = torch.zeros(2, time, dtype=torch.bool)
    starts[1, time // 2] = True

    def function(*args: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(*args[:6], initial_state=args[6], starts=starts, chunk=3)

    assert torch.autograd.gradcheck(function, ordered)


def operator_inputs(layout: str) -> dict[str, Tensor]:
    """Float32 inputs as views: "split" out of one projection, as the layer does; "time_first" with batch and time
    swapped in memory."""
    inputs = {name: tensor.float() for name, tensor in make_inputs(7).items()}
    if layout == "split":
        parts = torch.cat([inputs[name] for name in TIMED], -1).split([inputs[name].shape[-1] for name in TIMED], -1)
        inputs |= dict(zip(TIMED, parts, strict=True))
    elif layout == "time_first":
        inputs |= {name: inputs[name].transpose(0, 1).contiguous().transpose(0, 1) for name in TIMED}
    return inputs


# The dynamic-shape check compiles; once is enough.
QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize("given", ["little", "everything"])
@pytest.mark.parametrize("layout", ["contiguous", "split", "time_first"])
def test_opcheck(layout, given):
    """Schema, fake kernels (shapes, strides, dtypes) and autograd agree with what the operators do, also for inputs
    that are views."""
    inputs = operator_inputs(layout)
    leaves = [inputs[name].detach().requires_grad_() for name in NAMES]
    starts = torch.rand(BATCH, 7, generator=torch.Generator().manual_seed(0)) < 0.3
    arguments = (*leaves, starts, 3) if given == "everything" else (*leaves[:6], None, None, 3)
    whole = layout == "contiguous" and given == "everything"
    torch.library.opcheck(torch.ops.hybridlm.selective_scan.default, arguments, test_utils="ALL" if whole else QUICK)
    plain = [leaf.detach() for leaf in leaves[:6]]
    _, states = torch.ops.hybridlm.selective_scan.default(*plain, None, arguments[7], 3)
    dy = torch.randn(BATCH, 7, CHANNELS)
    backward = torch.ops.hybridlm.selective_scan_backward.default
    torch.library.opcheck(
        backward,
        (dy, torch.randn_like(states), *plain, arguments[7], states, 3),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_what_is_kept_for_the_backward_is_inputs_and_boundaries():
    """No tensor of (B, T, E, N): the states of every 32nd token only."""
    inputs = {
        name: tensor.float().requires_grad_() for name, tensor in make_inputs(320).items() if name in (*TIMED, "A", "D")
    }
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        selective_scan(**inputs, chunk=32)
    of_inputs = sum(tensor.numel() for tensor in inputs.values())
    assert sum(tensor.numel() for tensor in kept) == of_inputs + BATCH * (320 // 32 + 1) * CHANNELS * STATE


def test_the_decays_of_a_block_stay_small_whatever_the_chunk():
    """A chunk of 1,024 makes the blocks narrow, not the buffers large."""
    inputs = [
        torch.zeros(1, 4096, 64),
        torch.zeros(1, 4096, 64),
        -torch.ones(64, 16),
        torch.zeros(1, 4096, 16),
        torch.zeros(1, 4096, 16),
    ]
    for chunk in (1, 32, 1024):
        cut = selective_scan_blocks.cut_inputs(*inputs, None, chunk)
        assert cut.decay.numel() <= 1 << 22
        assert sum(block.k for block in cut.blocks) == 4096 // chunk
        assert math.prod(cut.x.shape) == 4096 * 64
