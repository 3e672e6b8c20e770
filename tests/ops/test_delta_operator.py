"""The operator of the gated delta rule as torch sees it: gradients by differences, schema, fake kernels, views,
compilation."""

from __future__ import annotations

import pytest
import torch
from recurrences import assert_near
from test_delta import BATCH, KEY, NAMES, TIMED, VALUE, each_kind, make_inputs, run, starts_of

from hybridlm.ops.delta import gated_delta

QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")
each_layout = pytest.mark.parametrize("layout", ["contiguous", "split", "time_first"])


def laid_out(kind: str, layout: str) -> dict[str, torch.Tensor]:
    """Float32 inputs, also as views: "split" out of one projection, as a layer does; "time_first" with batch and time
    swapped."""
    inputs = {name: tensor.float() for name, tensor in make_inputs(kind, 7).items()}
    if layout == "split":
        joined = torch.cat([inputs[name].flatten(2) for name in ("q", "k", "v")], -1)
        parts = joined.split([2 * KEY, 2 * KEY, 4 * VALUE], -1)
        inputs |= {
            name: part.unflatten(-1, inputs[name].shape[2:]) for name, part in zip(("q", "k", "v"), parts, strict=True)
        }
    elif layout == "time_first":
        inputs |= {name: inputs[name].transpose(0, 1).contiguous().transpose(0, 1) for name in TIMED}
    return inputs


@each_kind
@pytest.mark.parametrize("time", [1, 5])
def test_gradcheck(time, kind):
    inputs = {name: make_inputs(kind, time, batch=1)[name].requires_grad_() for name in NAMES}
    starts = torch.tensor([[False, False, True, True, False]])[:, :time]

    def function(*args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gated_delta(**dict(zip(NAMES, args, strict=True)), starts=starts, chunk=2)

    assert torch.autograd.gradcheck(function, list(inputs.values()), fast_mode=True)


@pytest.mark.slow
@each_kind
@each_layout
def test_opcheck(layout, kind):
    """Schema, fake kernel (shapes, strides, dtypes) and autograd agree with what the op does, also for inputs that are
    views."""
    inputs = laid_out(kind, layout)
    leaves = [inputs[name].detach().requires_grad_() for name in NAMES]
    operator = torch.ops.hybridlm.gated_delta.default
    whole = (
        "ALL" if layout == "contiguous" and kind == "gdn" else QUICK
    )  # the dynamic-shape check compiles; once is enough
    torch.library.opcheck(operator, (*leaves, starts_of(BATCH, 7), 4), test_utils=whole)
    torch.library.opcheck(operator, (*leaves[:-1], None, None, 4), test_utils=QUICK)


@pytest.mark.slow
@each_kind
@each_layout
def test_opcheck_of_the_backward(layout, kind):
    inputs = laid_out(kind, layout)
    tensors, starts = [inputs[name] for name in NAMES], starts_of(BATCH, 7)
    _, incoming, final = torch.ops.hybridlm.gated_delta(*tensors, starts, 4)
    operator = torch.ops.hybridlm.gated_delta_backward.default
    for dfinal, documents in ((torch.ones_like(final), starts), (None, None)):
        torch.library.opcheck(operator, (inputs["do"], dfinal, *tensors[:-1], documents, incoming, 4), test_utils=QUICK)


@each_kind
@each_layout
def test_views_change_nothing_and_inputs_stay_as_they_are(layout, kind):
    inputs, starts = laid_out(kind, layout), starts_of(BATCH, 7)
    plain = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in inputs.items()}
    assert_near(run(gated_delta, inputs, chunk=4, starts=starts), run(gated_delta, plain, chunk=4, starts=starts), 1e-6)
    assert all(torch.equal(inputs[name], plain[name]) for name in plain)


@pytest.mark.parametrize("time", [1, 7])
def test_meta_tensors(time):
    """What the planner and the counter of parameters build on: shapes and dtypes without contents."""
    inputs = {name: tensor.to("meta") for name, tensor in make_inputs("kda", time).items() if name in NAMES}
    o, state = gated_delta(**inputs)
    assert (o.shape, state.shape) == (inputs["v"].shape, inputs["initial_state"].shape)
    assert o.is_meta
    assert state.is_meta


def test_only_the_gradient_of_the_state_or_of_the_output_is_asked_for():
    inputs = make_inputs("kda", 7)
    leaves = {name: inputs[name].requires_grad_() for name in NAMES}
    whole = run(gated_delta, inputs, chunk=4)
    sums = []
    for i, upstream in enumerate(("do", "dstate")):
        result = gated_delta(**leaves, chunk=4)[i]
        sums.append(
            torch.autograd.grad((result * inputs[upstream]).sum(), list(leaves.values()), materialize_grads=True)
        )
    added = {f"d{name}": a + b for name, a, b in zip(NAMES, *sums, strict=True)}
    assert_near(added, {name: whole[name] for name in added}, 1e-12)


@pytest.mark.parametrize("chunk", [0, -2, 3, 48])
def test_a_chunk_is_a_power_of_two(chunk):
    inputs = {name: tensor for name, tensor in make_inputs("gdn", 7).items() if name in NAMES}
    with pytest.raises(ValueError, match="power of two"):
        gated_delta(**inputs, chunk=chunk)


@pytest.mark.slow
@each_kind
def test_compiled_as_one_graph(kind):
    """Chunks, documents and the step of one token."""
    whole = torch.compile(gated_delta, backend="aot_eager", fullgraph=True)
    for time in (7, 1):
        inputs, starts = make_inputs(kind, time), starts_of(BATCH, time)
        assert_near(run(whole, inputs, starts=starts, chunk=4), run(gated_delta, inputs, starts=starts, chunk=4), 1e-14)
