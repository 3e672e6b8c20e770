"""The chunked gated delta rule and its hand-written backward against the recurrence, and against tensors of other
implementations."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from recurrences import assert_near, relative_error
from recurrences_delta import gated_delta as recurrence
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hybridlm.ops import delta
from hybridlm.ops.delta import gated_delta

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(path.stem for kind in ("gdn", "kda") for path in GOLDEN.glob(f"{kind}*.json"))
NAMES = ("q", "k", "v", "log_decay", "beta", "initial_state")
TIMED = NAMES[:-1]
BATCH, HEADS, KEY, VALUE = 2, 4, 5, 3
each_kind = pytest.mark.parametrize("kind", ["gdn", "kda"])


def make_inputs(kind: str, time: int, key_heads: int = 2, batch: int = BATCH, seed: int = 0) -> dict[str, Tensor]:
    """Heads that keep much, less, little and next to nothing; beta up to 2; two vectors of zeros where there is
    room."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    rates = -torch.tensor([0.01, 0.3, 3.0, 30.0], dtype=torch.float64)
    inputs = {
        "q": randn(batch, time, key_heads, KEY),
        "k": randn(batch, time, key_heads, KEY),
        "v": randn(batch, time, HEADS, VALUE),
        "log_decay": rates * rand(batch, time, HEADS)
        if kind == "gdn"
        else rates[:, None] * rand(batch, time, HEADS, KEY),
        "beta": 2 * rand(batch, time, HEADS),
        "initial_state": randn(batch, HEADS, KEY, VALUE),
        "do": randn(batch, time, HEADS, VALUE),
        "dstate": randn(batch, HEADS, KEY, VALUE),
    }
    if time > 4:
        inputs["k"][0, 2, 0] = 0
        inputs["q"][0, 3, 0] = 0
    return inputs


def run(function, inputs: dict[str, Tensor], **settings) -> dict[str, Tensor]:
    """o, the final state, and the gradient of every input that is given, under ``sum(o do) + sum(state dstate)``."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in NAMES if name in inputs}
    o, state = function(**leaves, **settings)
    loss = (o.double() * inputs["do"]).sum() + (state.double() * inputs["dstate"]).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return {"o": o, "state": state} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


@cache
def expected(kind: str, time: int, key_heads: int) -> dict[str, Tensor]:
    return run(recurrence, make_inputs(kind, time, key_heads))


def starts_of(batch: int, time: int, seed: int = 0) -> Tensor:
    """Documents at random places, several of one token, one row without any, and one whose first token begins one."""
    starts = torch.rand(batch, time, generator=torch.Generator().manual_seed(seed)) < 0.25
    starts[0] = False
    starts[-1, 0] = True
    return starts


def part_of(inputs: dict[str, Tensor], tokens: slice) -> dict[str, Tensor]:
    return {name: tensor[:, tokens] if name in (*TIMED, "do") else tensor for name, tensor in inputs.items()}


@each_kind
@pytest.mark.parametrize("key_heads", [1, 2, HEADS])
@pytest.mark.parametrize("time", [1, 2, 7, 16, 33])
def test_output_state_and_all_gradients_in_float64(time, key_heads, kind):
    for chunk in (1, 4, 16, 64):
        assert_near(
            run(gated_delta, make_inputs(kind, time, key_heads), chunk=chunk), expected(kind, time, key_heads), 1e-10
        )


@each_kind
@pytest.mark.parametrize("given", [True, False], ids=["after_a_state", "from_nothing"])
@pytest.mark.parametrize("time", [1, 21])
def test_documents_at_random_places(time, given, kind):
    inputs, starts = make_inputs(kind, time, batch=4), starts_of(4, time)
    if not given:
        del inputs["initial_state"]
    want = run(recurrence, inputs, starts=starts)
    for chunk in (1, 4, 8, 64):
        got = run(gated_delta, inputs, starts=starts, chunk=chunk)
        if given:
            assert int(got["dinitial_state"][-1].count_nonzero()) == 0
        assert int(got["dlog_decay"][starts].count_nonzero()) == 0
        if time == 1 and not given:  # nothing came before that could decay
            assert int(got.pop("dlog_decay").count_nonzero()) == 0
            assert_near(got, {name: tensor for name, tensor in want.items() if name != "dlog_decay"}, 1e-10)
        else:
            assert_near(got, want, 1e-10)


@each_kind
def test_nothing_passes_between_documents(kind):
    """Not a rounding: the gradient of one document's output is exactly zero in every other, whatever the others
    hold."""
    starts = torch.zeros(1, 20, dtype=torch.bool)
    starts[0, [0, 3, 4, 11, 16]] = True
    document = starts.cumsum(1)
    leaves = {name: tensor.requires_grad_() for name, tensor in make_inputs(kind, 20, batch=1).items() if name in TIMED}
    do = make_inputs(kind, 20, batch=1)["do"]
    o, _ = gated_delta(**leaves, starts=starts, chunk=8)
    for i in range(1, 6):
        grads = torch.autograd.grad((o * do)[document == i].sum(), list(leaves.values()), retain_graph=True)
        assert all(int(grad[document != i].count_nonzero()) == 0 for grad in grads)
        assert int(grads[0][document == i].count_nonzero()) > 0
    changed = {
        name: torch.where((document == 2).view(1, 20, *(1,) * (t.dim() - 2)), t * 7, t) for name, t in leaves.items()
    }
    changed["log_decay"] = changed["log_decay"].masked_fill(
        starts.view(1, 20, *(1,) * (leaves["log_decay"].dim() - 2)), -1e6
    )
    other, _ = gated_delta(**changed, starts=starts, chunk=8)
    assert torch.equal(other[document != 2], o[document != 2])


@each_kind
@pytest.mark.parametrize("part", [1, 200], ids=["of_one_chunk", "of_a_few"])
def test_parts_change_nothing(part, kind, monkeypatch):
    """What a long text or many rows make of their chunks: several parts, the last of them shorter."""
    monkeypatch.setattr(delta, "_PART", part)
    inputs, starts = make_inputs(kind, 21, batch=3), starts_of(3, 21)
    for settings in ({}, {"starts": starts}):
        assert_near(run(gated_delta, inputs, chunk=4, **settings), run(recurrence, inputs, **settings), 1e-10)


@each_kind
@pytest.mark.parametrize("cut", [1, 5, 8, 19])
def test_any_split_is_the_whole_with_all_gradients(cut, kind):
    def in_two(**leaves: Tensor) -> tuple[Tensor, Tensor]:
        first, state = gated_delta(**part_of(leaves, slice(cut)), chunk=4)
        second, state = gated_delta(**part_of(leaves, slice(cut, None)) | {"initial_state": state}, chunk=4)
        return torch.cat([first, second], 1), state

    inputs = make_inputs(kind, 20)
    assert_near(run(in_two, inputs), run(gated_delta, inputs, chunk=8), 1e-11)


@each_kind
def test_token_by_token_is_the_whole(kind):
    """Decode: with the state written over itself, and dropped in the rows where a document begins."""
    inputs, starts = make_inputs(kind, 20, batch=4), starts_of(4, 20)
    want, last = gated_delta(**{name: inputs[name] for name in NAMES}, starts=starts, chunk=8)
    state, outputs = inputs["initial_state"].clone(), []
    place = state.data_ptr()
    for t in range(20):
        now = {name: inputs[name][:, t : t + 1] for name in TIMED}
        o, state = gated_delta(**now, initial_state=state, starts=starts[:, t : t + 1], overwrite=True)
        outputs.append(o)
    assert state.data_ptr() == place
    assert relative_error(torch.cat(outputs, 1), want) < 1e-12
    assert relative_error(state, last) < 1e-12


@each_kind
@pytest.mark.parametrize("time", [1, 11])
def test_no_decay_and_no_beta_keep_the_state(time, kind):
    """Bit for bit, whatever stands in q, k and v: how rows of padding keep theirs."""
    inputs = {name: tensor.float() for name, tensor in make_inputs(kind, time).items() if name in NAMES}
    inputs["log_decay"], inputs["beta"] = torch.zeros_like(inputs["log_decay"]), torch.zeros_like(inputs["beta"])
    assert torch.equal(gated_delta(**inputs, chunk=4)[1], inputs["initial_state"])


@each_kind
def test_beta_of_zero_has_its_gradient(kind):
    inputs = make_inputs(kind, 17)
    inputs["beta"][:, 3:9] = 0
    assert_near(run(gated_delta, inputs, chunk=8), run(recurrence, inputs), 1e-10)


@each_kind
@pytest.mark.parametrize("decay", [-100.0, -1e4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_strong_decay_is_finite_and_leaves_no_rounding_behind(dtype, decay, kind):
    """Among tokens that decay little; in a chunk the sum passes the range of exp many times over."""
    inputs = {name: tensor.to(dtype) for name, tensor in make_inputs(kind, 64).items()}
    inputs["log_decay"] /= 30
    inputs["log_decay"][:, 5:20] = decay
    if kind == "kda":
        inputs["log_decay"][:, 30:33, :, ::2] = decay
    got = run(gated_delta, inputs, chunk=64)
    assert all(bool(tensor.isfinite().all()) for tensor in got.values())
    want = run(recurrence, {name: tensor.double() for name, tensor in inputs.items()})
    assert_near(got, want, 1e-10 if dtype == torch.float64 else 1e-5)
    for name in ("o", "dq"):  # also by themselves where the decays are small again
        assert relative_error(got[name][:, 20:30], want[name][:, 20:30]) < (1e-10 if dtype == torch.float64 else 1e-5)


@each_kind
@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_one_key_again_and_again(beta, kind):
    """The system to be solved is as far from the identity as it can be, its solution stays small, and powers of it
    would not. With beta = 2 nothing dies away and the recurrence itself gathers rounding: float32 may have ten times as
    much in chunks."""
    inputs = {name: tensor.float() for name, tensor in make_inputs(kind, 64).items()}
    inputs["k"][:] = inputs["k"][:, :1]
    inputs["beta"][:] = beta
    inputs["log_decay"] *= 0
    want = run(recurrence, {name: tensor.double() for name, tensor in inputs.items()})
    rounding = max(relative_error(tensor, want[name]) for name, tensor in run(recurrence, inputs).items())
    assert_near(run(gated_delta, inputs, chunk=64), want, 10 * rounding)


@each_kind
def test_vectors_of_zeros_have_the_gradient_of_the_root_of_the_sum(kind):
    """1e3, not 1e12 or NaN."""
    inputs = make_inputs(kind, 9)
    inputs["q"] *= 0
    inputs["k"][:, ::2] *= 0
    got = run(gated_delta, inputs, chunk=4)
    assert_near(got, run(recurrence, inputs), 1e-10)
    assert 1 < float(got["dq"].abs().max()) < 1e5


@each_kind
@pytest.mark.parametrize("time", [17, 130])
def test_float32(time, kind):
    inputs = {name: tensor.float() for name, tensor in make_inputs(kind, time).items()}
    got = run(gated_delta, inputs)
    assert all(tensor.dtype == torch.float32 for tensor in got.values())
    assert_near(got, run(recurrence, {name: tensor.double() for name, tensor in inputs.items()}), 1e-5)


@each_kind
@pytest.mark.parametrize("time", [1, 40])
def test_bfloat16_inputs_keep_a_float32_state(time, kind):
    """Only what leaves in bfloat16 is rounded."""
    narrow = ("q", "k", "v", "beta")
    inputs = {
        name: tensor.to(torch.bfloat16 if name in narrow else torch.float32)
        for name, tensor in make_inputs(kind, time).items()
    }
    got = run(gated_delta, inputs, chunk=16)
    want = run(recurrence, {name: tensor.double() for name, tensor in inputs.items()})
    assert all(got[name].dtype == torch.bfloat16 for name in ("o", *(f"d{name}" for name in narrow)))
    assert got["state"].dtype == got["dlog_decay"].dtype == torch.float32
    assert relative_error(got["state"], want["state"]) < 1e-5
    assert_near(got, want, 2**-7)


@pytest.mark.parametrize("case", CASES)
def test_golden_recurrence(case):
    """From q, k, v, the decays and beta of other implementations to their output and states, in chunks and from their
    state on."""
    facts, tensors = json.loads((GOLDEN / f"{case}.json").read_text()), load_file(GOLDEN / f"{case}.safetensors")
    inputs = dict(zip(TIMED, (tensors[f"core.{name}"] for name in ("q", "k", "v", "g", "beta")), strict=True))
    prefill, total, want = facts["config"]["prefill_len"], inputs["v"].shape[1], tensors["core.o"]
    for end in (prefill, total):
        o, state = gated_delta(**part_of(inputs, slice(end)))
        assert relative_error(o, want[:, :end]) < facts["tolerance"]["core"]
        assert relative_error(state, tensors[f"state@{end}.recurrent_state"]) < facts["tolerance"]["state"]
    rest = part_of(inputs, slice(prefill, None))
    o, _ = gated_delta(**rest, initial_state=tensors[f"state@{prefill}.recurrent_state"])
    assert relative_error(o, want[:, prefill:]) < facts["tolerance"]["core"]


def test_there_are_golden_cases():
    assert len(CASES) == 12


@each_kind
def test_activation_checkpointing_and_autocast_change_nothing(kind):
    """Saved tensors are read once, and products in bfloat16 do not reach in: the same bit for bit."""
    inputs, starts = {name: tensor.float() for name, tensor in make_inputs(kind, 17).items()}, starts_of(BATCH, 17)

    def again(**leaves: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return checkpoint(lambda: gated_delta(**leaves, starts=starts, chunk=8), use_reentrant=False)

    want = run(gated_delta, inputs, starts=starts, chunk=8)
    got = run(again, inputs)
    assert all(torch.equal(got[name], want[name]) for name in want)
