"""The chunked scan and its hand-written backward against the recurrence."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from recurrences import assert_near, relative_error
from recurrences import ssd as recurrence
from token_loop import scan_loop
from torch import Tensor

from hybridlm.ops.ssd import scan, ssd

NAMES = ("x", "dt", "A", "B", "C", "D", "initial_state")
BATCH, HEADS, HEAD_DIM, STATE = 2, 4, 3, 5
LENGTHS = (1, 2, 15, 16, 17, 40)


def make_inputs(time: int, groups: int, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return {
        "x": randn(BATCH, time, HEADS, HEAD_DIM),
        "dt": torch.nn.functional.softplus(randn(BATCH, time, HEADS) - 1),
        "A": -torch.tensor([0.05, 0.7, 3.0, 16.0], dtype=torch.float64),
        "B": randn(BATCH, time, groups, STATE),
        "C": randn(BATCH, time, groups, STATE),
        "D": randn(HEADS),
        "initial_state": randn(BATCH, HEADS, HEAD_DIM, STATE),
        "dy": randn(BATCH, time, HEADS, HEAD_DIM),
        "dstate": randn(BATCH, HEADS, HEAD_DIM, STATE),
    }


def run(scan, inputs: dict[str, Tensor], **settings) -> dict[str, Tensor]:
    """y, the final state, and the gradient of every input under ``sum(y dy) + sum(state dstate)``."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in NAMES}
    initial = leaves.pop("initial_state")
    y, state = scan(**leaves, initial_state=initial, **settings)
    leaves["initial_state"] = initial
    loss = (y.double() * inputs["dy"]).sum() + (state.double() * inputs["dstate"]).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"y": y, "state": state} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


@cache
def expected(time: int, groups: int) -> dict[str, Tensor]:
    return run(recurrence, make_inputs(time, groups))


@pytest.mark.parametrize("groups", [1, 2, HEADS])
@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize("chunk", [1, 3, 16, 64])
def test_scan_and_all_gradients_in_float64(chunk, time, groups):
    assert_near(run(ssd, make_inputs(time, groups), chunk=chunk), expected(time, groups), 1e-10)


def scan_inputs(time: int, groups: int, *left_out: str) -> dict[str, Tensor]:
    """What ``scan`` takes instead of Mamba-2's: each token's decay and weight by themselves."""
    inputs = make_inputs(time, groups)
    inputs["log_decay"] = inputs["dt"] * inputs.pop("A")
    inputs["scale"] = inputs.pop("dt")
    return {name: tensor for name, tensor in inputs.items() if name not in left_out}


def run_scan(function, inputs: dict[str, Tensor], **settings) -> dict[str, Tensor]:
    """y, the final state, and the gradient of every input that is given."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items() if name not in ("dy", "dstate")}
    y, state = function(**leaves, **settings)
    loss = (y.double() * inputs["dy"]).sum() + (state.double() * inputs["dstate"]).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return {"y": y, "state": state} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


@pytest.mark.parametrize("left_out", [(), ("initial_state",)])
@pytest.mark.parametrize("groups", [1, 2, HEADS])
@pytest.mark.parametrize("time", [2, 17, 40])
def test_decay_and_weight_by_themselves_against_the_token_loop(time, groups, left_out):
    """Also where a token weighs nothing; chunks change nothing."""
    inputs = scan_inputs(time, groups, *left_out)
    inputs["scale"][:, 1] = 0
    want = run_scan(scan_loop, inputs)
    for chunk in (1, 3, 16, 64):
        assert_near(run_scan(scan, inputs, chunk=chunk), want, 1e-10)


@pytest.mark.parametrize("groups", [1, HEADS])
def test_one_token_against_the_token_loop(groups):
    """Decode: after a state, and as a chunk of its own without one."""
    for left_out in ((), ("initial_state",)):
        got, want = (run_scan(function, scan_inputs(1, groups, *left_out)) for function in (scan, scan_loop))
        if left_out:  # nothing came before that could decay
            assert max(float(side.pop("dlog_decay").abs().max()) for side in (got, want)) < 1e-14
        assert_near(got, want, 1e-10)


@pytest.mark.parametrize("groups", [1, 2, HEADS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("documents", [False, True])
def test_a_state_may_be_overwritten_by_one_token(documents, dtype, groups):
    """Decode: the same numbers, in the memory of the state that was given; also where the state is a view, as the scan
    returns it."""
    inputs = {name: tensor.to(dtype) for name, tensor in scan_inputs(1, groups, "dy", "dstate").items()}
    starts = torch.tensor([[True], [False]]) if documents else None
    state = inputs["initial_state"].to(torch.promote_types(dtype, torch.float32))
    y, want = scan(**inputs | {"initial_state": state}, starts=starts)
    for given in (state.clone(), state.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)):
        y_over, over = scan(**inputs | {"initial_state": given}, starts=starts, overwrite=True)
        assert over.data_ptr() == given.data_ptr()
        assert y_over.dtype == dtype
        assert torch.equal(over, want)
        assert relative_error(y_over, y) < 1e-6


def test_a_state_of_which_a_gradient_is_wanted_is_not_overwritten():
    inputs = scan_inputs(1, 2)
    want = inputs["initial_state"].clone()
    assert_near(run_scan(scan, inputs, overwrite=True), run_scan(scan_loop, inputs), 1e-10)
    assert torch.equal(inputs["initial_state"], want)


def test_a_scale_of_zero_writes_exactly_nothing():
    """Rows of padding keep their state bit for bit, an empty state included; x there does not matter to later
    tokens."""
    inputs = {name: tensor.float() for name, tensor in scan_inputs(23, 2, "dy", "dstate").items()}
    inputs["log_decay"][:, :9], inputs["scale"][:, :9] = 0, 0
    inputs["initial_state"][1] = 0
    first = {
        name: tensor[:, :9] if name in ("x", "log_decay", "scale", "B", "C") else tensor
        for name, tensor in inputs.items()
    }
    for chunk in (4, 64):
        assert torch.equal(scan(**first, chunk=chunk)[1], inputs["initial_state"])
        y, state = scan(**inputs, chunk=chunk)
        changed = inputs["x"].clone()
        changed[:, :9] = 1e6
        y_changed, state_changed = scan(**{**inputs, "x": changed}, chunk=chunk)
        assert torch.equal(y_changed[:, 9:], y[:, 9:])
        assert torch.equal(state_changed, state)


@pytest.mark.parametrize("time", [1, 17])
def test_without_an_initial_state_it_is_zero(time):
    inputs = make_inputs(time, 2)
    del inputs["dy"], inputs["dstate"], inputs["initial_state"]
    for got, want in zip(ssd(**inputs, chunk=8), recurrence(**inputs), strict=True):
        assert relative_error(got, want) < 1e-12


@pytest.mark.parametrize("time", [17, 40])
@pytest.mark.parametrize("chunk", [1, 16, 64])
def test_float32(chunk, time):
    inputs = {name: tensor.float() for name, tensor in make_inputs(time, 2).items()}
    got = run(ssd, inputs, chunk=chunk)
    want = run(recurrence, {name: tensor.double() for name, tensor in inputs.items()})
    assert all(tensor.dtype == torch.float32 for tensor in got.values())
    assert_near(got, want, 1e-5)


@pytest.mark.parametrize("time", [1, 17, 40])
def test_bfloat16_inputs_keep_a_float32_state(time):
    """Only what leaves in bfloat16 is rounded: the state is as exact as from float32 inputs."""
    inputs = make_inputs(time, 2)
    for name in ("x", "B", "C"):
        inputs[name] = inputs[name].bfloat16()
    for name in ("dt", "A", "D", "initial_state"):
        inputs[name] = inputs[name].float()
    got = run(ssd, inputs, chunk=16)
    want = run(recurrence, {name: tensor.double() for name, tensor in inputs.items()})
    assert got["y"].dtype == got["dx"].dtype == got["dB"].dtype == torch.bfloat16
    assert got["state"].dtype == got["ddt"].dtype == got["dA"].dtype == torch.float32
    assert relative_error(got["state"], want["state"]) < 1e-5
    assert relative_error(got["y"], want["y"]) < 2**-8
    assert all(bool(tensor.isfinite().all()) for tensor in got.values())
    for name in ("dx", "dB", "dC"):
        assert relative_error(got[name], want[name]) < 2**-7, name


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("time", [1, 17])
def test_autocast_does_not_reach_into_the_scan(time, documents):
    """Matrix products in bfloat16 would leave three digits of a float32 scan: output, state and gradients stay the same
    bit for bit."""
    inputs = {name: tensor.float() for name, tensor in scan_inputs(time, 2).items()}
    starts = torch.tensor([[True], [False]]).expand(2, time) if documents else None

    def under_autocast(**leaves):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return scan(**leaves)

    plain, cast = (run_scan(function, inputs, starts=starts, chunk=8) for function in (scan, under_autocast))
    for name, tensor in plain.items():
        assert torch.equal(cast[name], tensor), name


def test_the_state_chain_does_not_lose_small_contributions_in_bfloat16():
    """256 equal tokens that a bfloat16 state could not count: 256 + 1 is 256 there."""
    ones = torch.ones(1, 257, 1, 1, dtype=torch.bfloat16)
    dt, zero = torch.ones(1, 257, 1), torch.zeros(1)
    for chunk in (1, 16):
        _, state = ssd(ones, dt, zero, ones, ones, zero, chunk=chunk)
        assert float(state) == pytest.approx(257, rel=1e-6)


@pytest.mark.parametrize("chunk", [4, 16])
def test_steps_of_zero_neither_write_nor_decay(chunk):
    """dt = 0 also stands for padding; its gradient is that of the recurrence, not zero or infinite."""
    inputs = make_inputs(17, 2)
    inputs["dt"][:, 3:6] = 0
    inputs["dt"][1, 12] = 0
    assert_near(run(ssd, inputs, chunk=chunk), run(recurrence, inputs), 1e-10)


@pytest.mark.parametrize("chunk", [16, 64])
def test_decays_that_underflow_leave_no_nan(chunk):
    """exp(dt A) reaches exp(-800) within a token: nothing may be divided by such a product, nor its inverse
    overflow."""
    inputs = make_inputs(40, 1)
    inputs["dt"][:, 5:30] = 50.0
    got = run(ssd, inputs, chunk=chunk)
    assert all(bool(tensor.isfinite().all()) for tensor in got.values())
    assert_near(got, run(recurrence, inputs), 1e-10)


@pytest.mark.parametrize("scale", [4.0, 40.0])
def test_float32_with_large_steps(scale):
    """A token's own weight has no decay in it: rounding a running sum of dt A in the thousands must not reach it."""
    inputs = {name: tensor.float() for name, tensor in make_inputs(40, 2).items()}
    inputs["dt"] = inputs["dt"] * scale
    got = run(ssd, inputs, chunk=64)
    want = run(recurrence, {name: tensor.double() for name, tensor in inputs.items()})
    assert relative_error(got["y"], want["y"]) < 1e-5
    assert relative_error(got["state"], want["state"]) < 1e-5
    assert relative_error(got["dx"], want["dx"]) < 1e-5


@pytest.mark.parametrize("cut", [1, 7, 16, 39])
def test_any_split_is_the_whole(cut):
    inputs = make_inputs(40, 2)
    del inputs["dy"], inputs["dstate"]
    y, state = ssd(**inputs, chunk=16)
    timed = ("x", "dt", "B", "C")
    first, second = (
        {name: t[:, part] if name in timed else t for name, t in inputs.items()}
        for part in (slice(cut), slice(cut, None))
    )
    y1, middle = ssd(**first, chunk=16)
    y2, last = ssd(**{**second, "initial_state": middle}, chunk=16)
    assert relative_error(torch.cat([y1, y2], 1), y) < 1e-12
    assert relative_error(last, state) < 1e-12


def test_gradients_flow_through_a_split():
    """The second part's gradient reaches the first through the state between them."""
    inputs = make_inputs(17, 2)

    def in_two(x, dt, A, B, C, D, initial_state):
        y1, middle = ssd(x[:, :6], dt[:, :6], A, B[:, :6], C[:, :6], D, initial_state=initial_state, chunk=4)
        y2, last = ssd(x[:, 6:], dt[:, 6:], A, B[:, 6:], C[:, 6:], D, initial_state=middle, chunk=4)
        return torch.cat([y1, y2], 1), last

    assert_near(run(in_two, inputs), expected(17, 2), 1e-10)


@pytest.mark.parametrize("time", [1, 5])
def test_gradcheck(time):
    g = torch.Generator().manual_seed(0)
    shapes = {
        "x": (1, time, 2, 2),
        "B": (1, time, 1, 2),
        "C": (1, time, 1, 2),
        "D": (2,),
        "initial_state": (1, 2, 2, 2),
    }
    leaves = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    leaves |= {
        "dt": torch.rand(1, time, 2, generator=g, dtype=torch.float64) + 0.1,
        "A": -torch.tensor([0.5, 2.0], dtype=torch.float64),
    }
    ordered = [leaves[name].requires_grad_() for name in NAMES]

    def function(*args: Tensor) -> tuple[Tensor, Tensor]:
        return ssd(*args[:6], initial_state=args[6], chunk=2)

    assert torch.autograd.gradcheck(function, ordered)


def test_gradcheck_of_everything_at_once():
    """Decay and weight by themselves, groups and documents."""
    g = torch.Generator().manual_seed(0)
    shapes = {"x": (1, 5, 2, 2), "B": (1, 5, 2, 2), "C": (1, 5, 2, 2), "D": (2,), "initial_state": (1, 2, 2, 2)}
    leaves = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    rates = torch.rand(2, 1, 5, 2, generator=g, dtype=torch.float64) + 0.1
    leaves |= {"log_decay": -rates[0], "scale": rates[1]}
    starts = torch.tensor([[False, False, True, True, False]])

    def function(*args: Tensor) -> tuple[Tensor, Tensor]:
        return scan(**dict(zip(leaves, args, strict=True)), starts=starts, chunk=3)

    assert torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in leaves.values()])


def laid_out(layout: str) -> dict[str, Tensor]:
    """Float32 inputs as views: "split" out of one projection, as the layer does; "time_first" with batch and time
    swapped in memory."""
    inputs = {name: tensor.float() for name, tensor in scan_inputs(7, 2).items()}
    if layout == "split":
        joined = torch.cat([inputs[name].flatten(2) for name in ("x", "B", "C")], -1)
        parts = joined.split([HEADS * HEAD_DIM, 2 * STATE, 2 * STATE], -1)
        inputs |= {
            name: part.unflatten(-1, inputs[name].shape[2:]) for name, part in zip(("x", "B", "C"), parts, strict=True)
        }
    elif layout == "time_first":
        timed = ("x", "log_decay", "scale", "B", "C")
        inputs |= {name: inputs[name].transpose(0, 1).contiguous().transpose(0, 1) for name in timed}
    return inputs


# The dynamic-shape check compiles; once is enough.
QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")
ARGUMENTS = ("x", "log_decay", "scale", "B", "C", "D", "initial_state")
STARTS = torch.tensor([[False, False, True, False, True, True, False], [True] + 6 * [False]])
every_layout = pytest.mark.parametrize("layout", ["contiguous", "split", "time_first"])


@pytest.mark.parametrize("given", ["little", "everything"])
@every_layout
def test_opcheck(layout, given):
    """Schema, fake kernel (shapes, strides, dtypes) and autograd agree with what the op does, also for inputs that are
    views."""
    inputs = laid_out(layout)
    leaves = [inputs[name].detach().requires_grad_() for name in ARGUMENTS]
    starts = STARTS
    if given == "little":
        starts = leaves[-1] = None
    whole = layout == "contiguous" and given == "everything"
    torch.library.opcheck(torch.ops.hybridlm.scan.default, (*leaves, starts, 3), test_utils="ALL" if whole else QUICK)


@pytest.mark.parametrize("given", ["little", "everything"])
@every_layout
def test_opcheck_of_the_backward(layout, given):
    inputs = laid_out(layout)
    starts = STARTS
    if given == "little":
        starts = inputs["initial_state"] = None
    arguments = [inputs[name] for name in ARGUMENTS]
    _, incoming, final = torch.ops.hybridlm.scan(*arguments, starts, 3)
    dfinal = None if given == "little" else torch.ones_like(final)
    args = (inputs["dy"], dfinal, *arguments[:-1], starts, incoming, 3)
    torch.library.opcheck(torch.ops.hybridlm.scan_backward.default, args, test_utils=QUICK)


@every_layout
def test_views_change_nothing(layout):
    inputs = laid_out(layout)
    plain = {name: tensor.clone().contiguous() for name, tensor in inputs.items()}
    assert_near(run_scan(scan, inputs, chunk=3, starts=STARTS), run_scan(scan, plain, chunk=3, starts=STARTS), 1e-6)
