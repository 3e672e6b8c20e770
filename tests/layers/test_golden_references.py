"""The recurrences of these tests against the golden tensors: what the other tests compare with is itself held by other
implementations."""

from __future__ import annotations

import pytest
import torch
from golden_cases import (
    MIXERS,
    MOE,
    MOE_SOFTMAX,
    SCANS,
    circular,
    golden_states,
    load,
    mixer_spec,
    moe_spec,
    prefill_length,
)
from recurrences import MIXERS as RECURRENCES
from recurrences import assert_near, below, moe, relative_error


def leaves_of(tensors):
    return {
        name: tensor.double().requires_grad_()
        for name, tensor in {"u": tensors["u"], **below(tensors, "param.")}.items()
    }


@pytest.mark.parametrize("case", MIXERS)
def test_mixer_outputs_and_gradients(case):
    facts, tensors = load(case)
    leaves, spec = leaves_of(tensors), mixer_spec(facts["config"])
    y = RECURRENCES[type(spec)](leaves, leaves["u"], spec)[0]
    assert relative_error(y, tensors["y"]) < facts["tolerance"]["y"]
    grads = torch.autograd.grad((y * tensors["grad_out"]).sum(), list(leaves.values()))
    assert_near(dict(zip(leaves, grads, strict=True)), below(tensors, "grad."), facts["tolerance"]["grad"])


@pytest.mark.parametrize("case", SCANS)
def test_states_and_the_way_on_from_them(case):
    """The state after the prefill, and what the rest of the text makes of it."""
    facts, tensors = load(case)
    leaves, spec = leaves_of(tensors), mixer_spec(facts["config"])
    run, cut = RECURRENCES[type(spec)], prefill_length(facts)
    with torch.no_grad():
        before, states = run(leaves, leaves["u"][:, :cut], spec)
        after, last = run(leaves, leaves["u"][:, cut:], spec, states)
    assert relative_error(torch.cat([before, after], 1), tensors["y"]) < facts["tolerance"]["y"]
    for length, got in ((cut, states), (tensors["u"].shape[1], last)):
        want = golden_states(spec, tensors, length)
        for name, tensor in want.items():
            mine = getattr(got, name)
            if name == "conv":
                padded = torch.cat([mine.new_zeros(mine.shape[0], spec.d_conv - 1, mine.shape[2]), mine], 1)
                mine = padded[:, padded.shape[1] - spec.d_conv + 1 :]
            assert relative_error(circular(name, mine, tensor), tensor) < facts["tolerance"]["state"], name


@pytest.mark.parametrize("case", MOE)
def test_experts_and_router(case):
    facts, tensors = load(case)
    leaves, spec = leaves_of(tensors), moe_spec(facts["config"])
    y, routing = moe(leaves, leaves["u"], spec)
    tolerance = facts["tolerance"]
    assert relative_error(y, tensors["y"]) < tolerance["y"]
    trained = {name: leaf for name, leaf in leaves.items() if name != "gate.e_score_correction_bias"}
    grads = torch.autograd.grad((y * tensors["grad_out"]).sum(), list(trained.values()), retain_graph=True)
    assert_near(dict(zip(trained, grads, strict=True)), below(tensors, "grad."), tolerance["grad"])
    assert relative_error(routing.logits, tensors["router_logits"]) < tolerance["y"]
    assert [set(chosen) for chosen in routing.chosen] == [set(row) for row in tensors["topk_indices"].tolist()]
    got, want = torch.zeros(2, len(routing.chosen), spec.n_experts, dtype=torch.float64)
    got.scatter_(1, torch.tensor(routing.chosen), routing.weights.detach())
    want.scatter_(1, tensors["topk_indices"], tensors["topk_weights"].double())
    assert relative_error(got, want) < tolerance["y"]
    assert routing.counts.tolist() == tensors["topk_indices"].flatten().bincount(minlength=spec.n_experts).tolist()


@pytest.mark.parametrize("case", MOE_SOFTMAX)
def test_balance_loss_in_its_published_form(case):
    facts, tensors = load(case)
    leaves, spec = leaves_of(tensors), moe_spec(facts["config"])
    loss = moe(leaves, leaves["u"], spec)[1].hf_loss
    assert relative_error(loss.reshape(1), tensors["aux_loss"]) < facts["tolerance"]["y"]
    grads = torch.autograd.grad(loss, [leaves["u"], leaves["gate.weight"]])
    assert_near(
        dict(zip(("u", "gate.weight"), grads, strict=True)), below(tensors, "aux_grad."), facts["tolerance"]["grad"]
    )
