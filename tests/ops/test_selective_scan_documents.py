"""Documents and padding in Mamba-1's scan: nothing of what came before a document is left, and steps of zero are no
steps."""

from __future__ import annotations

import pytest
import torch
from recurrences import assert_near, relative_error
from selective_scan_loop import BATCH, CHANNELS, STATE, TIMED, make_inputs, run, token_loop
from torch import Tensor

from hybridlm.ops import selective_scan_blocks
from hybridlm.ops.selective_scan import selective_scan


@pytest.fixture(params=["one block", "blocks of many chunks", "blocks of few chunks", "blocks of one chunk"])
def blocks(request, monkeypatch):
    """How much of the text is worked off together: everything, or so many chunks of 24 states that blocks end within
    rows and chunks."""
    steps = {"one block": 1 << 17, "blocks of many chunks": 7, "blocks of few chunks": 2, "blocks of one chunk": 1}[
        request.param
    ]
    monkeypatch.setattr(selective_scan_blocks, "_STEP", steps * CHANNELS * STATE)


def with_starts(scan, starts: Tensor):
    return lambda **leaves: scan(**leaves, starts=starts)


@pytest.mark.parametrize("chunk", [1, 3, 8])
@pytest.mark.usefixtures("blocks")
def test_a_document_may_start_at_every_offset_of_a_chunk(chunk):
    """Row by row at another place, the first token and the last included; gradients do not cross either."""
    time = 20
    inputs = make_inputs(time, batch=time)
    starts = torch.eye(time, dtype=torch.bool)
    got = run(with_starts(lambda **leaves: selective_scan(**leaves, chunk=chunk), starts), inputs)
    assert_near(got, run(with_starts(token_loop, starts), inputs), 1e-10)
    assert float(got["dinitial_state"][0].abs().max()) == 0, "a document at the first token drops the initial state"


@pytest.mark.parametrize("density", [0.1, 0.4, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("chunk", [1, 3, 32, 64])
@pytest.mark.usefixtures("blocks")
def test_documents_of_all_lengths(chunk, dtype, density):
    """Several in a chunk, of one token too; 1.0: of one token only."""
    inputs = {name: tensor.to(dtype) for name, tensor in make_inputs(70).items()}
    starts = torch.rand(BATCH, 70, generator=torch.Generator().manual_seed(2)) < density
    got = run(with_starts(lambda **leaves: selective_scan(**leaves, chunk=chunk), starts), inputs)
    want = run(with_starts(token_loop, starts), {name: tensor.double() for name, tensor in inputs.items()})
    if density == 1.0:  # no token has a past
        for name in ("dA", "dinitial_state"):
            assert max(float(side.pop(name).abs().max()) for side in (got, want)) == 0, name
    assert_near(got, want, 1e-10 if dtype == torch.float64 else 1e-5)


def test_documents_joined_are_the_documents_alone():
    """Bit for bit nothing of what came before is left: a past of 1e200 would show."""
    inputs = {name: tensor for name, tensor in make_inputs(40).items() if name not in ("dy", "dstate")}
    starts = torch.zeros(BATCH, 40, dtype=torch.bool)
    starts[:, 13] = True
    y, state = selective_scan(**inputs, starts=starts, chunk=8)
    loud = {name: tensor.clone() for name, tensor in inputs.items()}
    loud["x"][:, :13] = 1e200
    y_loud, state_loud = selective_scan(**loud, starts=starts, chunk=8)
    assert torch.equal(y_loud[:, 13:], y[:, 13:])
    assert torch.equal(state_loud, state)
    alone = {
        name: tensor[:, 13:] if name in TIMED else tensor for name, tensor in inputs.items() if name != "initial_state"
    }
    y_alone, state_alone = selective_scan(**alone, chunk=8)
    assert relative_error(y[:, 13:], y_alone) < 1e-12
    assert relative_error(state, state_alone) < 1e-12


@pytest.mark.parametrize("time", [1, 9])
def test_a_start_drops_the_state_even_where_nothing_decays(time):
    """exp(A_log) underflows to 0 at A_log below -103 in float32."""
    inputs = {name: tensor.float() for name, tensor in make_inputs(time).items() if name not in ("dy", "dstate")}
    inputs["A"] = -torch.zeros(CHANNELS, STATE)
    starts = torch.zeros(BATCH, time, dtype=torch.bool)
    starts[:, 0] = True
    y, state = selective_scan(**inputs, starts=starts, chunk=4)
    del inputs["initial_state"]
    y_fresh, state_fresh = selective_scan(**inputs, chunk=4)
    assert relative_error(y, y_fresh) < 1e-6
    assert relative_error(state, state_fresh) < 1e-6


def test_starts_nowhere_are_no_starts():
    inputs = make_inputs(40)
    got = run(selective_scan, inputs, chunk=8, starts=torch.zeros(BATCH, 40, dtype=torch.bool))
    want = run(selective_scan, inputs, chunk=8)
    assert all(torch.equal(got[name], want[name]) for name in want)


# Padding: steps of zero.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("blocks")
def test_rows_of_steps_of_zero_keep_their_state_bit_for_bit(dtype):
    """Whatever stands there; a row of padding next to rows of tokens too, and a single column of it."""
    inputs = {name: tensor.to(dtype) for name, tensor in make_inputs(23).items() if name not in ("dy", "dstate")}
    inputs["dt"][1] = 0
    inputs["x"][1] = 1e30
    for chunk in (4, 64):
        assert torch.equal(selective_scan(**inputs, chunk=chunk)[1][1], inputs["initial_state"][1])
    column = {name: tensor[:, :1] if name in TIMED else tensor for name, tensor in inputs.items()}
    assert torch.equal(selective_scan(**column, chunk=4)[1][1], inputs["initial_state"][1])


def test_steps_of_zero_before_the_tokens_change_nothing():
    inputs = {name: tensor for name, tensor in make_inputs(40).items() if name not in ("dy", "dstate")}
    inputs["dt"][:, :11] = 0
    y, state = selective_scan(**inputs, chunk=8)
    y_tokens, state_tokens = selective_scan(**{n: t[:, 11:] if n in TIMED else t for n, t in inputs.items()}, chunk=8)
    assert relative_error(y[:, 11:], y_tokens) < 1e-12
    assert relative_error(state, state_tokens) < 1e-12


def test_gradients_at_steps_of_zero_are_the_recurrences():
    inputs = make_inputs(40)
    inputs["dt"][:, 3:17] = 0
    inputs["dt"][1] = 0
    assert_near(run(selective_scan, inputs, chunk=8), run(token_loop, inputs), 1e-10)
