"""The causal convolution with its SiLU and its hand-written backward against loops over tokens and taps."""

from __future__ import annotations

import pytest
import torch
from recurrences import assert_near, relative_error, silu
from recurrences import causal_conv as recurrence
from torch import Tensor

from hybridlm.ops.conv import causal_conv


def make_inputs(time: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"x": (2, time, 3), "weight": (3, 1, width), "bias": (3,), "state": (2, width - 1, 3)}
    return {name: torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


def reference(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    width = weight.shape[-1]
    before = x.new_zeros(x.shape[0], width - 1, x.shape[2]) if state is None else state
    line = torch.cat([before, x], 1)
    return silu(recurrence(x, weight, bias, state)), line[:, line.shape[1] - (width - 1) :]


def run(conv, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output, new state, and every gradient under fixed random weights on both."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    out, state = conv(**leaves)
    g = torch.Generator().manual_seed(9)
    dout, dstate = (torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype) for t in (out, state))
    grads = torch.autograd.grad((out * dout).sum() + (state * dstate).sum(), list(leaves.values()))
    return {"out": out, "new_state": state} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


@pytest.mark.parametrize("given", ["state", "no_state"])
@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("time", [1, 2, 3, 9])
def test_output_state_and_all_gradients(time, width, given):
    """Also with fewer tokens than taps, where the new state still holds old inputs."""
    inputs = make_inputs(time, width)
    if given == "no_state":
        del inputs["state"]
    assert_near(run(causal_conv, inputs), run(reference, inputs), 1e-12)


def test_a_width_of_one_has_no_past():
    inputs = make_inputs(5, 1)
    out, state = causal_conv(**inputs)
    assert relative_error(out, silu(inputs["x"] * inputs["weight"][:, 0, 0] + inputs["bias"])) < 1e-14
    assert state.shape == (2, 0, 3)


@pytest.mark.parametrize("cut", [1, 2, 3, 8])
def test_any_split_is_the_whole(cut):
    inputs = make_inputs(9, 4)
    out, state = causal_conv(**inputs)
    first, middle = causal_conv(**{**inputs, "x": inputs["x"][:, :cut]})
    second, last = causal_conv(**{**inputs, "x": inputs["x"][:, cut:], "state": middle})
    assert relative_error(torch.cat([first, second], 1), out) < 1e-14
    assert torch.equal(last, state)


def test_the_inputs_are_left_alone():
    inputs = make_inputs(5, 4)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    causal_conv(**inputs)
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)


def test_weights_follow_the_dtype_of_x():
    """Under autocast x is bfloat16 and the weights float32; the gradients return in each leaf's own dtype."""
    inputs = make_inputs(9, 4, dtype=torch.float32)
    inputs["x"] = inputs["x"].bfloat16()
    got = run(causal_conv, inputs)
    want = run(reference, {name: tensor.double() for name, tensor in inputs.items()})
    assert got["out"].dtype == got["new_state"].dtype == got["dx"].dtype == torch.bfloat16
    assert got["dweight"].dtype == got["dbias"].dtype == torch.float32
    assert relative_error(got["out"], want["out"]) < 2e-2
    assert relative_error(got["dweight"], want["dweight"]) < 2e-2


def test_gradcheck():
    leaves = [tensor.requires_grad_() for tensor in make_inputs(4, 3).values()]
    assert torch.autograd.gradcheck(causal_conv, leaves)


def test_opcheck():
    inputs = make_inputs(6, 4, dtype=torch.float32)
    leaves = [inputs[name].requires_grad_() for name in ("x", "weight", "bias")]
    torch.library.opcheck(torch.ops.hybridlm.causal_conv.default, tuple(leaves))


def test_opcheck_of_the_backward():
    inputs = make_inputs(6, 4, dtype=torch.float32)
    _, out = torch.ops.hybridlm.causal_conv(inputs["x"], inputs["weight"], inputs["bias"])
    torch.library.opcheck(torch.ops.hybridlm.causal_conv_backward.default, (torch.ones_like(out), inputs["x"], inputs["weight"], out))
