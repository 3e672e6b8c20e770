"""The causal convolution with its SiLU and its hand-written backward against loops over tokens and taps."""

from __future__ import annotations

import pytest
import torch
from recurrences import assert_near, relative_error, silu
from recurrences import causal_conv as recurrence
from torch import Tensor

from hybridlm.ops.conv import causal_conv


def make_inputs(
    time: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64, batch: int = 2
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"x": (batch, time, 3), "weight": (3, 1, width), "bias": (3,), "state": (batch, width - 1, 3)}
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
    results = {"out": out, "new_state": state} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: tensor for name, tensor in results.items() if tensor.numel()}  # a width of one has no state


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


# Documents and padding.

LAYOUTS = [[first, 13 - first] for first in range(1, 13)] + [[1] * 13, [2, 1, 3, 1, 1, 5], [13]]


def places(layouts: list[list[int]], *, earlier: int = 0) -> Tensor:
    """(B, T) position of each token in its document; the first document of a row goes on after ``earlier`` tokens."""
    rows = []
    for lengths in layouts:
        row = [t for length in lengths for t in range(length)]
        rows.append([t + earlier for t in row[: lengths[0]]] + row[lengths[0] :])
    return torch.tensor(rows)


def by_tokens(
    x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, positions: Tensor, padding: list[int]
) -> tuple[Tensor, Tensor]:
    """Row by row, token by token, tap by tap; zero at padding."""
    width = weight.shape[-1]
    outputs, states = [], []
    for row, shift in enumerate(padding):
        line = torch.cat([state[row], x[row, shift:]])
        tokens = []
        for t in range(x.shape[1] - shift):
            taps = [
                line[width - 1 + t - lag] * weight[:, 0, width - 1 - lag]
                for lag in range(min(width - 1, int(positions[row, shift + t])) + 1)
            ]
            tokens.append(silu(sum(taps, bias)))
        outputs.append(torch.stack([torch.zeros_like(bias)] * shift + tokens))
        states.append(line[len(line) - width + 1 :])
    return torch.stack(outputs), torch.stack(states)


@pytest.mark.parametrize("given", ["state", "no_state"])
@pytest.mark.parametrize("earlier", [0, 1, 2, 50])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_documents(width, earlier, given):
    """A tap reaches no further than its document, which may go on from tokens in the state that stand behind another
    document's."""
    positions = places(LAYOUTS, earlier=earlier)
    inputs = make_inputs(13, width, batch=len(LAYOUTS))
    state = inputs["state"] if given == "state" else torch.zeros_like(inputs["state"])
    if given == "no_state":
        del inputs["state"]
    none = [0] * len(LAYOUTS)
    got = run(lambda **leaves: causal_conv(**leaves, positions=positions), inputs)
    assert_near(
        got,
        run(lambda **leaves: by_tokens(**{"state": state, **leaves}, positions=positions, padding=none), inputs),
        1e-12,
    )


@pytest.mark.parametrize("time", [1, 2])
def test_documents_in_fewer_tokens_than_taps(time):
    """Decode: the window still holds another document's inputs."""
    for earlier in range(5):
        positions = places([[time], [1] * time], earlier=earlier)
        inputs = make_inputs(time, 4)
        got = run(lambda **leaves: causal_conv(**leaves, positions=positions), inputs)
        want = run(lambda **leaves: by_tokens(**leaves, positions=positions, padding=[0, 0]), inputs)
        assert_near(got, want, 1e-12)


def test_no_gradient_passes_between_documents():
    layout = [2, 1, 3, 1, 1, 5]
    inputs = {name: tensor.requires_grad_() for name, tensor in make_inputs(13, 4, batch=1).items()}
    out, _ = causal_conv(**inputs, positions=places([layout]))
    document = torch.tensor([i for i, length in enumerate(layout) for _ in range(length)])
    for i in range(len(layout)):
        dx, dstate = torch.autograd.grad(out[:, document == i].sum(), (inputs["x"], inputs["state"]), retain_graph=True)
        assert int(dx[:, document != i].count_nonzero()) == 0
        assert bool((dx[:, document == i] != 0).all())
        assert int(dstate.count_nonzero()) == 0


def test_an_infinite_input_stays_in_its_document():
    """What is dropped is not multiplied by zero."""
    inputs = make_inputs(8, 4)
    inputs["x"][:, 3], inputs["state"] = torch.inf, inputs["state"] * torch.nan
    out, _ = causal_conv(**inputs, positions=places([[4, 4], [4, 1, 3]]))
    assert bool(out[:, :3].isfinite().all())
    assert bool(out[:, 4:].isfinite().all())


WIDTHS = [0, 1, 2, 5, 9]  # columns of padding; the last row has no token


@pytest.mark.parametrize("given", ["state", "no_state"])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_padding(width, documents, given):
    """The state stands in front of each row's first token; nothing of padding shows, and it gets no gradient."""
    inputs = make_inputs(9, width, batch=len(WIDTHS))
    state = inputs["state"] if given == "state" else torch.zeros_like(inputs["state"])
    if given == "no_state":
        del inputs["state"]
    place = torch.arange(9) - torch.tensor(WIDTHS).unsqueeze(1)
    positions = (
        torch.where(place >= 2, place - 2, place + 1).clamp_min(0) if documents else torch.full((len(WIDTHS), 9), 99)
    )
    settings = {"padding": torch.tensor(WIDTHS)} | ({"positions": positions} if documents else {})
    got = run(lambda **leaves: causal_conv(**leaves, **settings), inputs)
    want = run(lambda **leaves: by_tokens(**{"state": state, **leaves}, positions=positions, padding=WIDTHS), inputs)
    assert_near(got, want, 1e-12)
    assert int(got["dx"][place < 0].count_nonzero()) == 0
    if given == "state" and width > 1:
        assert torch.equal(got["new_state"][-1], inputs["state"][-1]), (
            "a row without a token keeps its state bit for bit"
        )
    changed = {**inputs, "x": torch.where((place < 0).unsqueeze(-1), torch.nan, inputs["x"])}
    assert_near(run(lambda **leaves: causal_conv(**leaves, **settings), changed), got, 0.0)


def test_gradcheck_with_documents_and_padding():
    leaves = [tensor.requires_grad_() for tensor in make_inputs(5, 3).values()]
    positions, padding = torch.tensor([[0, 0, 7, 0, 1], [0, 1, 2, 0, 0]]), torch.tensor([2, 0])
    assert torch.autograd.gradcheck(lambda *args: causal_conv(*args, positions=positions, padding=padding), leaves)


# The operators.

QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")
POSITIONS = torch.tensor([[0, 0, 1, 2, 3, 4], [7, 8, 0, 1, 0, 0]])


def as_view(x: Tensor) -> Tensor:
    """The same, cut out of a wider tensor, as the layer cuts it out of its projection."""
    return torch.cat([x, x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]]


@pytest.mark.parametrize("given", ["little", "everything"])
def test_opcheck(given):
    inputs = make_inputs(6, 4, dtype=torch.float32)
    x, *others = [inputs[name].requires_grad_() for name in ("x", "weight", "bias", "state")]
    if given == "little":
        torch.library.opcheck(
            torch.ops.hybridlm.causal_conv.default, (as_view(x.detach()).requires_grad_(), *others[:2], None, None)
        )
    else:
        torch.library.opcheck(torch.ops.hybridlm.causal_conv.default, (x, *others, POSITIONS), test_utils=QUICK)


@pytest.mark.parametrize("given", ["little", "everything"])
def test_opcheck_of_the_backward(given):
    inputs = make_inputs(6, 4, dtype=torch.float32)
    x, before, positions = inputs["x"], inputs["state"], POSITIONS
    if given == "little":
        x, before, positions = as_view(x), None, None
    _, out = torch.ops.hybridlm.causal_conv(x, inputs["weight"], inputs["bias"], before, positions)
    args = (torch.ones_like(out), x, inputs["weight"], before, positions, out)
    torch.library.opcheck(torch.ops.hybridlm.causal_conv_backward.default, args, test_utils=QUICK)


def test_a_view_changes_nothing():
    inputs = make_inputs(6, 4)
    assert_near(run(causal_conv, {**inputs, "x": as_view(inputs["x"])}), run(causal_conv, inputs), 1e-14)
