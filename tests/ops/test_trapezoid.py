"""Mamba-3's angles, what a token writes under the trapezoidal rule, and one token of the recurrence, against loops over
the tokens."""

from __future__ import annotations

import math

import pytest
import torch
from recurrences import assert_near, relative_error
from torch import Tensor

from hybridlm.ops.mimo import mimo_scan, untiled
from hybridlm.ops.trapezoid import angles, carried_state, previous_weight, trapezoid_step, turned, write_weight

BATCH, HEADS, N_ANGLES, HEAD_DIM, STATE = 2, 3, 2, 4, 6
SPAN = 64  # tokens that the angles are summed over at once
LAYOUTS = [[5, 195], [64, 136], [63, 1, 136], [1] * 200, [130, 70], [65, 64, 71], [200]]


def starts_of(layouts: list[list[int]], *, first: bool = True) -> Tensor:
    starts = torch.zeros(len(layouts), sum(layouts[0]), dtype=torch.bool)
    for row, lengths in enumerate(layouts):
        starts[row, [sum(lengths[:i]) for i in range(len(lengths))]] = True
    starts[:, 0] &= first
    return starts


def make_rates(time: int, batch: int = BATCH, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """rate (B, T, n), dt (B, T, H) and the angle before (B, H, n)."""
    g = torch.Generator().manual_seed(seed)
    rate = torch.randn(batch, time, N_ANGLES, generator=g, dtype=torch.float64)
    dt = torch.rand(batch, time, HEADS, generator=g, dtype=torch.float64)
    return rate, dt, 6 * torch.rand(batch, HEADS, N_ANGLES, generator=g, dtype=torch.float64)


def angle_loop(rate: Tensor, dt: Tensor, initial: Tensor | None, starts: Tensor | None) -> Tensor:
    """(B, H, n, T), never reduced to a turn."""
    theta = dt.new_zeros(len(dt), dt.shape[2], rate.shape[2]) if initial is None else initial
    outputs = []
    for t in range(dt.shape[1]):
        if starts is not None:
            theta = torch.where(starts[:, t, None, None], torch.zeros_like(theta), theta)
        theta = theta + math.pi * torch.tanh(rate[:, t, None, :]) * dt[:, t, :, None]
        outputs.append(theta)
    return torch.stack(outputs, -1)


def apart(a: Tensor, b: Tensor) -> float:
    """The largest angle between directions a and b."""
    return float((torch.remainder(a.double() - b.double() + math.pi, 2 * math.pi) - math.pi).detach().abs().max())


# Angles.


@pytest.mark.parametrize("documents", [None, "new", "going_on"])
@pytest.mark.parametrize("with_initial", [True, False])
@pytest.mark.parametrize("time", [1, 2, 63, 64, 65, 200])
def test_angles_are_the_loops_within_one_turn(time, with_initial, documents):
    rate, dt, initial = make_rates(time, len(LAYOUTS))
    initial = initial if with_initial else None
    starts = None if documents is None else starts_of(LAYOUTS, first=documents == "new")[:, :time]
    theta = angles(rate, dt, initial, starts)
    assert theta.shape == (len(LAYOUTS), HEADS, N_ANGLES, time)
    assert float(theta.min()) >= 0
    assert float(theta.max()) < 2 * math.pi
    assert apart(theta, angle_loop(rate, dt, initial, starts)) < 1e-11


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("time", [1, 7, 64, 200])
def test_gradients_of_the_angles(time, documents):
    rate, dt, initial = make_rates(time, len(LAYOUTS))
    starts = starts_of(LAYOUTS, first=False)[:, :time] if documents else None
    upstream = torch.randn(
        len(LAYOUTS), HEADS, N_ANGLES, time, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    leaves = {"rate": rate.requires_grad_(), "dt": dt.requires_grad_(), "initial": initial.requires_grad_()}
    results = []
    for function in (angles, angle_loop):
        grads = torch.autograd.grad((function(*leaves.values(), starts) * upstream).sum(), list(leaves.values()))
        results.append(dict(zip(leaves, grads, strict=True)))
    assert_near(*results, 1e-11)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{len(layout)}_of_{layout[0]}")
def test_no_gradient_of_an_angle_passes_between_documents(layout):
    """Exactly none, in either direction, however large the angles of the other document."""
    starts, document = starts_of([layout]), starts_of([layout]).cumsum(1)
    rate, dt, _ = make_rates(200, 1)
    dt[document % 2 == 0] *= 1e5
    rate, dt = rate.requires_grad_(), dt.requires_grad_()
    theta = angles(rate, dt, None, starts).movedim(-1, 1)
    for i in sorted({1, 2, int(document.max())} & set(document.flatten().tolist())):
        for grad in torch.autograd.grad((theta[document == i] ** 2).sum(), [rate, dt], retain_graph=True):
            assert int(grad[document != i].count_nonzero()) == 0, i
            assert bool(grad[document == i].all()), i


def test_what_stood_before_a_document_does_not_change_its_angles():
    """Bit for bit."""
    rate, dt, _ = make_rates(200, 1)
    starts = starts_of([[70, 130]])
    changed = dt.clone()
    changed[:, :70] *= 1e6
    assert torch.equal(angles(rate, dt, None, starts)[..., 70:], angles(rate, changed, None, starts)[..., 70:])


@pytest.mark.parametrize("documents", [False, True])
def test_angles_do_not_drift_in_float32(documents):
    """After 20,000 tokens that all turn the same way, to the rounding of single steps. A running sum in float32 is off
    by 6e-2, one of steps with a pi of float32 by 5e-4."""
    rate, dt, initial = (tensor.float() for tensor in make_rates(20_000, 1))
    rate = rate.abs()
    starts = starts_of([[9, 19_991]]) if documents else None
    got, want = angles(rate, dt, initial, starts), angle_loop(rate.double(), dt.double(), initial.double(), starts)
    assert got.dtype == torch.float32
    assert apart(got[..., -1], want[..., -1]) < 2e-5


def test_opcheck_of_the_sums_within_documents():
    values = torch.randn(2, HEADS, N_ANGLES, 70, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    starts = starts_of([[3, 67], [64, 6]])
    for reverse in (False, True):
        torch.library.opcheck(
            torch.ops.hybridlm.document_sums.default, (values.clone().requires_grad_(), starts, reverse)
        )
    strided = values.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    torch.library.opcheck(
        torch.ops.hybridlm.document_sums.default, (strided, starts, True), test_utils=("test_schema", "test_faketensor")
    )


# Weights.


def test_a_token_is_written_at_its_own_step_and_at_the_next():
    dt = torch.tensor([[[1.0], [2.0], [4.0], [8.0]]], dtype=torch.float64)
    mix = torch.tensor([[[0.25], [0.5], [1.0], [0.125]]], dtype=torch.float64)
    previous = previous_weight(dt, mix, None)
    assert previous.flatten().tolist() == [0.75, 1.0, 0.0, 7.0]
    assert write_weight(mix * dt, previous, None).flatten().tolist() == [0.25 + 1.0, 1.0 + 0.0, 4.0 + 7.0, 1.0]


def test_nothing_is_looked_ahead_into_the_next_document():
    dt, mix = torch.full((1, 5, 1), 2.0), torch.full((1, 5, 1), 0.25)
    starts = torch.tensor([[True, False, True, True, False]])
    previous = previous_weight(dt, mix, starts)
    assert previous.flatten().tolist() == [0.0, 1.5, 0.0, 0.0, 1.5]
    assert write_weight(mix * dt, previous, None).flatten().tolist() == [0.5 + 1.5, 0.5, 0.5, 0.5 + 1.5, 0.5]


def test_padding_writes_nothing_though_a_token_follows_it():
    valid = torch.tensor([[False, False, True, True]])
    dt = torch.full((1, 4, 1), 2.0).masked_fill(~valid.unsqueeze(-1), 0.0)
    mix = torch.full((1, 4, 1), 0.25)
    weight = write_weight(mix * dt, previous_weight(dt, mix, None), valid)
    assert weight.flatten().tolist() == [0.0, 0.0, 0.5 + 1.5, 0.5]


@pytest.mark.parametrize("rank", [1, 3])
def test_the_token_before_is_added_to_the_carried_state(rank):
    """With the weight of each row's first token, which padding may stand in front of."""
    g = torch.Generator().manual_seed(0)
    shapes = (
        (3, HEADS, HEAD_DIM, STATE),
        (3, rank, HEADS, STATE),
        (3, HEADS, HEAD_DIM),
        (3, 5, HEADS),
        (HEADS, rank, HEAD_DIM),
    )
    state, k, v, previous, mimo_x = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    padding = torch.tensor([0, 3, 5])
    previous[1, :3] = previous[2] = 0  # padding takes no time
    for weights in (mimo_x, None):
        ranks = torch.ones_like(mimo_x) if weights is None else weights
        write = torch.einsum("hrp,bhp,brhn->bhpn", ranks, v, k)
        for columns, first in (
            (None, previous[:, 0]),
            (padding, torch.stack([previous[0, 0], previous[1, 3], previous[2, 4]])),
        ):
            got = carried_state(state, k, v, previous, columns, weights)
            assert relative_error(got, state + first[..., None, None] * write) < 1e-13
    assert torch.equal(carried_state(state, k, v, previous, padding, mimo_x)[2], state[2])


# One token.


@pytest.mark.parametrize("adjacent", [True, False], ids=["adjacent", "half_split"])
@pytest.mark.parametrize("groups", [1, HEADS])
def test_one_token_turned_by_hand(groups, adjacent):
    g = torch.Generator().manual_seed(0)
    v = torch.randn(BATCH, 2, groups, STATE, generator=g, dtype=torch.float64)
    bias = torch.randn(HEADS, 2, STATE, generator=g, dtype=torch.float64)
    theta = 6 * torch.rand(BATCH, HEADS, N_ANGLES, generator=g, dtype=torch.float64)
    got = turned(v, bias, theta, adjacent=adjacent)
    for row, r, h in torch.cartesian_prod(*(torch.arange(size) for size in (BATCH, 2, HEADS))).tolist():
        want = v[row, r, h if groups > 1 else 0] + bias[h, r]
        for i in range(N_ANGLES):
            a, b = (2 * i, 2 * i + 1) if adjacent else (i, i + STATE // 2)
            cos, sin = math.cos(theta[row, h, i]), math.sin(theta[row, h, i])
            want[a], want[b] = want[a] * cos - want[b] * sin, want[a] * sin + want[b] * cos
        assert relative_error(got[row, r, h], want) < 1e-14
    assert torch.equal(turned(v, bias, None, adjacent=adjacent), v.expand(-1, -1, HEADS, -1) + bias.transpose(0, 1))


def step_inputs(rank: int, time: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {
        "x": (BATCH, time, HEADS, HEAD_DIM),
        "k": (BATCH, time, rank, HEADS, STATE),
        "c": (BATCH, time, rank, HEADS, STATE),
    }
    shapes |= {"D": (HEADS,), "mimo_x": (HEADS, rank, HEAD_DIM), "state": (BATCH, HEADS, HEAD_DIM, STATE)}
    inputs = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    rates = torch.rand(3, BATCH, time, HEADS, generator=g, dtype=torch.float64)
    return inputs | {"decay": rates[0], "own": rates[1], "previous": rates[2]}


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize(("trapezoidal", "projected"), [(True, True), (False, True), (True, False)])
def test_token_by_token_is_the_scan_with_the_look_ahead(trapezoidal, projected, overwrite, rank):
    """The two-term recurrence of the paper against one write per token."""
    inputs, no_bias = step_inputs(rank, 9), torch.zeros(HEADS, rank, STATE, dtype=torch.float64)
    x, k, c, decay, own, previous = (inputs[name] for name in ("x", "k", "c", "decay", "own", "previous"))
    mimo_x, state = inputs["mimo_x"] if projected else None, inputs["state"].clone()
    scale = write_weight(own, previous, None) if trapezoidal else own
    first = carried_state(state, torch.zeros_like(k[:, 0]), x[:, 0], previous, None, mimo_x)
    assert torch.equal(first, state)
    y, last = mimo_scan(
        x, decay.log(), scale, own, k, c, no_bias, no_bias, None, mimo_x, inputs["D"], initial_state=state, chunk=4
    )
    y, outputs = untiled(y, 9), []
    before = (torch.zeros_like(k[:, 0]), torch.zeros_like(x[:, 0]))
    for t in range(9):
        kept = state.clone()
        out, new = trapezoid_step(
            x[:, t],
            decay[:, t],
            own[:, t],
            k[:, t],
            c[:, t],
            inputs["D"],
            mimo_x,
            state,
            before=(previous[:, t], *before) if trapezoidal else None,
            overwrite=overwrite,
        )
        assert (new.data_ptr() == state.data_ptr()) == overwrite
        assert overwrite or torch.equal(state, kept)
        state, before = new, (k[:, t], x[:, t])
        outputs.append(out)
    assert relative_error(torch.stack(outputs, 1), y) < 1e-13
    assert relative_error(state, last) < 1e-13


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_step_from_a_state_in_another_layout(overwrite):
    """As the scan hands it on, its axes permuted in memory."""
    inputs = step_inputs(2, 1)
    x, decay, own, k, c = (inputs[name][:, 0] for name in ("x", "decay", "own", "k", "c"))
    results = []
    for state in (inputs["state"].clone(), inputs["state"].permute(1, 3, 0, 2).contiguous().permute(2, 0, 3, 1)):
        results.append(
            trapezoid_step(x, decay, own, k, c, inputs["D"], inputs["mimo_x"], state, before=None, overwrite=overwrite)
        )
    for got, want in zip(*results, strict=True):
        assert relative_error(got, want) < 1e-14


def test_gradients_of_a_step_and_no_state_overwritten_that_they_need():
    inputs = step_inputs(2, 1)
    names = ("x", "decay", "own", "k", "c", "previous", "D", "mimo_x", "state")
    leaves = [
        (tensor[:, 0] if name not in ("D", "mimo_x", "state") else tensor)
        for name in names
        for tensor in (inputs[name],)
    ]
    k_before, x_before = (inputs[name][:, 0].flip(0) for name in ("k", "x"))

    def step(x, decay, own, k, c, previous, D, mimo_x, state):
        return trapezoid_step(
            x, decay, own, k, c, D, mimo_x, state, before=(previous, k_before, x_before), overwrite=True
        )

    assert torch.autograd.gradcheck(step, [leaf.clone().requires_grad_() for leaf in leaves])


def test_autocast_does_not_reach_into_a_step():
    inputs = {name: tensor.float() for name, tensor in step_inputs(2, 1).items()}
    x, decay, own, k, c, previous = (inputs[name][:, 0] for name in ("x", "decay", "own", "k", "c", "previous"))
    results = []
    for cast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            state = carried_state(inputs["state"], k.flip(0), x, inputs["previous"], None, inputs["mimo_x"])
            results.append(
                trapezoid_step(
                    x, decay, own, k, c, inputs["D"], inputs["mimo_x"], state, before=(previous, k.flip(0), x)
                )
            )
    for plain, cast in zip(*results, strict=True):
        assert torch.equal(plain, cast)
