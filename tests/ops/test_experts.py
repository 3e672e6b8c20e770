"""The experts' computation against a loop over tokens: both ways of doing it, gradients, empty experts, the custom
operators' contracts."""

from __future__ import annotations

import pytest
import torch
from recurrences import assert_near, silu
from torch import Tensor

from hybridlm.ops import experts as experts_module
from hybridlm.ops.experts import mixture

N, D, WIDTH, E = 11, 8, 16, 5
gates = pytest.mark.parametrize("gated", [True, False], ids=["swiglu", "relu2"])


def make(gated: bool, top_k: int = 2, dtype: torch.dtype = torch.float64, allowed: int = E) -> dict[str, Tensor]:
    """Inputs of ``mixture``; only the first ``allowed`` experts are chosen."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    return {
        "x": draw(N, D).requires_grad_(),
        "experts": torch.rand(N, allowed, generator=g).topk(top_k).indices,
        "weights": draw(N, top_k).requires_grad_(),
        "up": (draw(E, 2 * WIDTH if gated else WIDTH, D) * D**-0.5).requires_grad_(),
        "down": (draw(E, D, WIDTH) * WIDTH**-0.5).requires_grad_(),
    }


def token_by_token(x: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor, *, gated: bool) -> Tensor:
    rows = []
    for n in range(x.shape[0]):
        row = torch.zeros_like(x[n])
        for slot, expert in enumerate(experts[n].tolist()):
            hidden = up[expert] @ x[n]
            active = silu(hidden[:WIDTH]) * hidden[WIDTH:] if gated else torch.relu(hidden) ** 2
            row = row + weights[n, slot] * (down[expert] @ active)
        rows.append(row)
    return torch.stack(rows)


def with_gradients(function, inputs: dict[str, Tensor], **settings) -> dict[str, Tensor]:
    y = function(**inputs, **settings)
    leaves = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    # A gradient that is not contiguous, as the sum of a broadcast one is.
    dy = torch.randn(y.shape[::-1], generator=torch.Generator().manual_seed(9), dtype=torch.float64).t().to(y.dtype)
    return {"y": y, **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))}


def grouped(x: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor, *, gated: bool) -> Tensor:
    """The way that a GPU takes; torch's grouped product has a slow equivalent on a CPU."""
    order = experts.flatten().argsort(stable=True)
    offsets = torch.bincount(experts.flatten(), minlength=E).cumsum(0).to(torch.int32)
    return experts_module._experts_grouped(x, weights, order, offsets, up, down, gated)


@gates
@pytest.mark.parametrize(("top_k", "allowed"), [(1, E), (2, E), (E, E), (2, 3)])
def test_output_and_gradients_are_those_of_a_loop_over_tokens(gated, top_k, allowed):
    inputs = make(gated, top_k, allowed=allowed)
    assert_near(
        with_gradients(mixture, inputs, gated=gated), with_gradients(token_by_token, inputs, gated=gated), 1e-12
    )


@gates
@pytest.mark.parametrize(("top_k", "allowed"), [(1, E), (2, E), (2, 3)])
def test_the_grouped_kernels_way_is_the_same(gated, top_k, allowed):
    narrow, wide = (make(gated, top_k, dtype, allowed) for dtype in (torch.float32, torch.float64))
    assert_near(with_gradients(grouped, narrow, gated=gated), with_gradients(token_by_token, wide, gated=gated), 2e-6)


@gates
def test_an_expert_without_tokens_has_a_gradient_of_zero(gated):
    inputs = make(gated, allowed=3)
    for way in (mixture, grouped):
        if way is grouped:
            inputs = make(gated, dtype=torch.float32, allowed=3)
        grads = with_gradients(way, inputs, gated=gated)
        for name in ("up", "down"):
            assert torch.equal(grads[name][3:], torch.zeros_like(grads[name][3:]))
            assert all(float(expert.abs().max()) > 0 for expert in grads[name][:3])


@gates
def test_bfloat16_keeps_its_dtype_and_wide_weights(gated):
    wide = make(gated)
    narrow = {
        name: tensor.detach().to(torch.float32 if name == "weights" else torch.bfloat16).requires_grad_()
        if tensor.is_floating_point()
        else tensor
        for name, tensor in wide.items()
    }
    exact = {
        name: tensor.detach().double().requires_grad_() if tensor.is_floating_point() else tensor
        for name, tensor in narrow.items()
    }
    got, want = with_gradients(mixture, narrow, gated=gated), with_gradients(token_by_token, exact, gated=gated)
    assert {name: tensor.dtype for name, tensor in got.items()} == {
        name: torch.float32 if name == "weights" else torch.bfloat16 for name in got
    }
    assert_near(got, want, 2e-2)


@gates
def test_the_order_of_the_chosen_experts_does_not_matter(gated):
    inputs = make(gated)
    swapped = inputs | {"experts": inputs["experts"].flip(1), "weights": inputs["weights"].flip(1)}
    torch.testing.assert_close(mixture(**swapped, gated=gated), mixture(**inputs, gated=gated), rtol=0, atol=1e-13)


def test_inputs_that_need_no_gradient_get_none():
    inputs = make(True)
    inputs["x"] = inputs["x"].detach()
    mixture(**inputs, gated=True).sum().backward()
    assert inputs["x"].grad is None
    assert inputs["up"].grad is not None


@gates
def test_the_custom_operators_keep_torchs_rules(gated):
    """Fake kernels, schemas and autograd registration, by torch's own checks."""
    inputs = make(gated)
    order = inputs["experts"].flatten().argsort(stable=True)
    offsets = torch.bincount(inputs["experts"].flatten(), minlength=E).cumsum(0).to(torch.int32)
    arguments = (inputs["x"], inputs["weights"], order, offsets, inputs["up"], inputs["down"], gated)
    torch.library.opcheck(experts_module._experts, arguments)
    y, hidden = experts_module._experts(*arguments)
    detached = [value.detach() if isinstance(value, Tensor) else value for value in arguments]
    torch.library.opcheck(
        experts_module._experts_backward, (torch.randn_like(y), *detached[:-1], hidden.detach(), gated)
    )


def test_no_work_grows_with_the_tokens_but_in_tensors():
    """As many operator calls for 400 tokens as for 40: nothing loops over them."""

    def calls(tokens: int) -> int:
        inputs = make(True)
        x = torch.randn(tokens, D, dtype=torch.float64, requires_grad=True)
        experts = torch.arange(tokens).unsqueeze(1).add(torch.arange(2)) % E
        with torch.profiler.profile() as profile:
            mixture(
                x, experts, torch.ones(tokens, 2, dtype=torch.float64), inputs["up"], inputs["down"], gated=True
            ).sum().backward()
        return sum(event.count for event in profile.key_averages() if event.key.startswith("aten::"))

    calls(40)
    assert calls(400) == calls(40)
