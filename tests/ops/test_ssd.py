"""The chunked scan and its hand-written backward against the recurrence."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from recurrences import assert_near, relative_error
from recurrences import ssd as recurrence
from torch import Tensor

from hybridlm.ops.ssd import ssd

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
    assert relative_error(got.pop("dA"), want.pop("dA")) < 5e-5  # a sum over all tokens of terms that cancel
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
    """exp(dt A) reaches exp(-800) within a token: nothing may be divided by such a product, nor its inverse overflow."""
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
    first, second = ({name: t[:, part] if name in timed else t for name, t in inputs.items()} for part in (slice(cut), slice(cut, None)))
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
    shapes = {"x": (1, time, 2, 2), "B": (1, time, 1, 2), "C": (1, time, 1, 2), "D": (2,), "initial_state": (1, 2, 2, 2)}
    leaves = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    leaves |= {"dt": torch.rand(1, time, 2, generator=g, dtype=torch.float64) + 0.1, "A": -torch.tensor([0.5, 2.0], dtype=torch.float64)}
    ordered = [leaves[name].requires_grad_() for name in NAMES]

    def scan(*args: Tensor) -> tuple[Tensor, Tensor]:
        return ssd(*args[:6], initial_state=args[6], chunk=2)

    assert torch.autograd.gradcheck(scan, ordered)


def laid_out(layout: str) -> dict[str, Tensor]:
    """Float32 inputs as views: "split" out of one projection, as the layer does; "time_first" with batch and time swapped in memory."""
    inputs = {name: tensor.float() for name, tensor in make_inputs(7, 2).items()}
    if layout == "split":
        joined = torch.cat([inputs[name].flatten(2) for name in ("x", "B", "C")], -1)
        parts = joined.split([HEADS * HEAD_DIM, 2 * STATE, 2 * STATE], -1)
        inputs |= {name: part.unflatten(-1, inputs[name].shape[2:]) for name, part in zip(("x", "B", "C"), parts, strict=True)}
    elif layout == "time_first":
        inputs |= {name: inputs[name].transpose(0, 1).contiguous().transpose(0, 1) for name in ("x", "dt", "B", "C")}
    return inputs


# The dynamic-shape check compiles; once is enough.
QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")
every_layout = pytest.mark.parametrize("layout", ["contiguous", "split", "time_first"])


@pytest.mark.parametrize("start", ["zero", "given"])
@every_layout
def test_opcheck(layout, start):
    """Schema, fake kernel (shapes, strides, dtypes) and autograd agree with what the op does, also for inputs that are views."""
    inputs = laid_out(layout)
    leaves = [inputs[name].detach().requires_grad_() for name in NAMES]
    if start == "zero":
        leaves[-1] = None
    whole = layout == "contiguous" and start == "given"
    torch.library.opcheck(torch.ops.hybridlm.ssd.default, (*leaves, 3), test_utils="ALL" if whole else QUICK)


@every_layout
def test_opcheck_of_the_backward(layout):
    inputs = laid_out(layout)
    y, states = torch.ops.hybridlm.ssd(*[inputs[name] for name in NAMES], 3)
    args = (inputs["dy"], torch.zeros_like(states), *[inputs[name] for name in NAMES[:-1]], y, states, 3)
    torch.library.opcheck(torch.ops.hybridlm.ssd_backward.default, args, test_utils=QUICK)


@every_layout
def test_views_change_nothing(layout):
    inputs = laid_out(layout)
    assert_near(run(ssd, inputs, chunk=3), run(ssd, {name: tensor.clone().contiguous() for name, tensor in inputs.items()}, chunk=3), 1e-6)
