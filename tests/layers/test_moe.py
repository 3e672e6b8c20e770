"""Mixture of experts against a float64 loop over tokens: every way of routing, its losses and counts, padding,
precision, fresh weights."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from recurrences import assert_near, mlp, relative_error, sigmoid
from torch import Tensor

from hybridlm.config.ffns.mlp import MLPSpec
from hybridlm.config.ffns.moe import MoEConfig, MoESpec
from hybridlm.config.mixers.attention import AttentionConfig
from hybridlm.config.mixers.mamba2 import Mamba2Config
from hybridlm.config.model import ModelConfig
from hybridlm.layers.init import Init
from hybridlm.layers.moe import MoE
from hybridlm.model.build import build_model, fresh_model
from hybridlm.ops.router import balance_loss, expert_counts

BASE = MoESpec(
    d_model=6,
    n_experts=8,
    top_k=3,
    d_expert=5,
    d_shared=0,
    shared_gate=False,
    activation="swiglu",
    router="softmax",
    norm_topk_prob=True,
    routed_scaling_factor=1.0,
    n_expert_groups=1,
    topk_groups=1,
    balance_loss_weight=0.3,
    z_loss_weight=0.2,
    bias_update_rate=0.01,
)
SPECS = {
    "softmax": {},
    "softmax, not normalised": {"norm_topk_prob": False},
    "softmax, relu2, shared, scaled": {"activation": "relu2", "d_shared": 7, "routed_scaling_factor": 1.7},
    "softmax, gated shared": {"d_shared": 7, "shared_gate": True},
    "softmax, all experts": {"top_k": 8},
    "softmax, one of eight": {"top_k": 1, "norm_topk_prob": False},
    "one expert": {"n_experts": 1, "top_k": 1},
    "sigmoid": {"router": "sigmoid"},
    "sigmoid, not normalised": {"router": "sigmoid", "norm_topk_prob": False},
    "sigmoid, groups, shared, scaled": {
        "router": "sigmoid",
        "n_expert_groups": 4,
        "topk_groups": 2,
        "d_shared": 10,
        "routed_scaling_factor": 2.5,
    },
    "sigmoid, relu2, two groups": {
        "router": "sigmoid",
        "activation": "relu2",
        "n_expert_groups": 2,
        "topk_groups": 1,
        "top_k": 4,
    },
}
every_spec = pytest.mark.parametrize(
    "spec", [dataclasses.replace(BASE, **changes) for changes in SPECS.values()], ids=list(SPECS)
)
SIGMOID = dataclasses.replace(BASE, router="sigmoid", d_shared=4)


def make_layer(spec: MoESpec, dtype: torch.dtype = torch.float64) -> MoE:
    layer = MoE(spec).to(dtype)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=g, dtype=torch.float64) * 0.6)
    return layer


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chosen_experts(scores: list[float], spec: MoESpec) -> list[int]:
    """The experts with the best scores, of the groups whose best two have the best sum."""
    size = spec.n_experts // spec.n_expert_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(spec.n_expert_groups)]
    if spec.n_expert_groups > 1:
        groups.sort(key=lambda members: -sum(sorted(scores[e] for e in members)[-2:]))
    candidates = [expert for members in groups[: spec.topk_groups] for expert in members]
    return sorted(candidates, key=lambda expert: -scores[expert])[: spec.top_k]


def token_by_token(p: dict[str, Tensor], bias: Tensor | None, x: Tensor, spec: MoESpec) -> dict[str, Tensor]:
    """x: (N, D). The output, both losses, and the counts; the losses are differentiable."""
    rows, masses, squares = [], [], []
    counts = [0] * spec.n_experts
    for token in x:
        logits = p["gate.weight"] @ token
        total = torch.log(torch.exp(logits).sum())
        scores = torch.exp(logits - total) if spec.router == "softmax" else sigmoid(logits)
        chosen = chosen_experts((scores if bias is None else scores + bias).tolist(), spec)
        share = sum(scores[expert] for expert in chosen) if spec.norm_topk_prob else 1.0
        row = torch.zeros_like(token)
        for expert in chosen:
            counts[expert] += 1
            if spec.activation == "swiglu":
                gate, up = p["experts.gate_up_proj"][expert].split(spec.d_expert)
                own = {"gate_proj.weight": gate, "up_proj.weight": up}
            else:
                own = {"up_proj.weight": p["experts.up_proj"][expert]}
            own["down_proj.weight"] = p["experts.down_proj"][expert]
            y = mlp(own, token, MLPSpec(spec.d_model, spec.d_expert, spec.activation))
            row = row + spec.routed_scaling_factor * scores[expert] / share * y
        if spec.d_shared:
            shared = {
                name.removeprefix("shared_experts."): tensor
                for name, tensor in p.items()
                if name.startswith("shared_experts.")
            }
            passes = sigmoid(p["shared_gate.weight"][0] @ token) if spec.shared_gate else 1.0
            row = row + passes * mlp(shared, token, MLPSpec(spec.d_model, spec.d_shared, spec.activation))
        rows.append(row)
        masses.append(scores / scores.sum())
        squares.append(total**2)
    mean = sum(masses) / len(masses)
    pairs = len(x) * spec.top_k
    balance = sum(spec.n_experts * count / pairs * mean[expert] for expert, count in enumerate(counts))
    return {
        "y": torch.stack(rows),
        "balance": balance,
        "z": sum(squares) / len(squares),
        "counts": torch.tensor(counts),
    }


def bias_of(layer: MoE) -> Tensor | None:
    return dict(layer.named_buffers()).get("gate.e_score_correction_bias")


@every_spec
def test_output_statistics_and_all_gradients(spec):
    layer = make_layer(spec)
    x = draw(2, 7, spec.d_model).requires_grad_()
    leaves = {"x": x, **dict(layer.named_parameters())}
    y, stats = layer(x)
    want = token_by_token(dict(layer.named_parameters()), bias_of(layer), x.flatten(0, 1), spec)
    assert stats.counts.tolist() == want["counts"].tolist()
    torch.testing.assert_close(stats.aux, 0.3 * stats.balance_loss + 0.2 * stats.z_loss)
    results = []
    for output, balance, z in (
        (y, stats.balance_loss, stats.z_loss),
        (want["y"].view(y.shape), want["balance"], want["z"]),
    ):
        grads = torch.autograd.grad(
            (output * draw(2, 7, spec.d_model, seed=2)).sum(), list(leaves.values()), retain_graph=True
        )
        # Every gradient exists, also of one term alone where the router's weights are all one.
        results.append({"y": output, "balance": balance, "z": z} | dict(zip(leaves, grads, strict=True)))
    assert_near(*results, 1e-12) if spec.n_experts > 1 else assert_near(
        *[drop_router(result) for result in results], 1e-12
    )
    losses = []
    for balance, z in ((stats.balance_loss, stats.z_loss), (want["balance"], want["z"])):
        losses.append(
            dict(zip(["x", "gate"], torch.autograd.grad(0.3 * balance + 0.2 * z, [x, layer.gate.weight]), strict=True))
        )
    assert_near(*losses, 1e-12)


def drop_router(result: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a single expert's normalised weight, which is one: its gradient is zero up to rounding, which no relative
    error measures."""
    assert float(result["gate.weight"].abs().max()) < 1e-12
    return {name: tensor for name, tensor in result.items() if name != "gate.weight"}


def test_the_bias_selects_but_does_not_weigh():
    layer = make_layer(SIGMOID)
    x = draw(1, 9, 6)
    layer.gate.e_score_correction_bias.zero_()
    plain = layer.gate.route(layer.gate(x[0]))
    layer.gate.e_score_correction_bias[2] = 10.0
    biased = layer.gate.route(layer.gate(x[0]))
    assert not (plain.experts == 2).any(1).all()
    assert (biased.experts == 2).any(1).all()
    scores = layer.gate(x[0]).sigmoid().gather(1, biased.experts)
    torch.testing.assert_close(biased.weights, scores / scores.sum(-1, keepdim=True))


def test_the_balance_loss_is_one_where_experts_are_used_alike_and_grows_to_e_over_k():
    experts = (torch.arange(16).unsqueeze(1) + torch.arange(2)) % 8
    even = balance_loss(torch.full((16, 8), 1 / 8, dtype=torch.float64), expert_counts(experts, 8))
    assert even.item() == pytest.approx(1.0, abs=1e-15)
    # Even counts suffice: whatever the mean probabilities are, they sum to one.
    skewed = draw(16, 8).softmax(-1)
    assert float(balance_loss(skewed, expert_counts(experts, 8))) == pytest.approx(1.0, abs=1e-15)
    alone = torch.zeros(16, 8, dtype=torch.float64)
    alone[:, :2] = 0.5
    assert float(balance_loss(alone, expert_counts(torch.tensor([[0, 1]] * 16), 8))) == pytest.approx(4.0)


@pytest.mark.parametrize("spec", [BASE, SIGMOID], ids=["softmax", "sigmoid"])
def test_padding_counts_nowhere(spec):
    layer = make_layer(spec)
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[0, :3] = valid[1, :1] = False
    x = draw(2, 7, 6)
    loud = x.masked_fill(~valid.unsqueeze(-1), 0.0) + draw(2, 7, 6, seed=5) * (~valid).unsqueeze(-1) * 50
    results = []
    for given in (x, loud):
        given = given.clone().requires_grad_()
        y, stats = layer(given, valid)
        assert torch.isfinite(y).all()
        loss = (y * draw(2, 7, 6, seed=2)).masked_fill(~valid.unsqueeze(-1), 0.0).sum() + stats.aux
        grads = torch.autograd.grad(loss, [given, *layer.parameters()])
        assert torch.equal(grads[0][~valid], torch.zeros_like(grads[0][~valid]))
        results.append([y[valid], stats.balance_loss, stats.z_loss, grads[0][valid], *grads[1:]])
        assert stats.counts.sum() == valid.sum() * spec.top_k
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    alone, own = layer(x[valid].unsqueeze(0))
    torch.testing.assert_close(alone[0], results[0][0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close([own.balance_loss, own.z_loss], results[0][1:3], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("spec", [BASE, SIGMOID], ids=["softmax", "sigmoid"])
def test_a_batch_that_is_all_padding_gives_zero_losses_and_gradients_for_every_parameter(spec):
    layer = make_layer(spec)
    y, stats = layer(torch.zeros(2, 3, 6, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.bool))
    assert stats.counts.tolist() == [0] * 8
    assert stats.aux.item() == 0.0
    (0.0 * y.sum() + stats.aux).backward()
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


def test_an_expert_without_tokens_has_a_gradient_of_zero():
    layer = make_layer(SIGMOID)
    layer.gate.e_score_correction_bias[3] = -100.0
    y, stats = layer(draw(2, 7, 6))
    y.square().sum().backward()
    assert int(stats.counts[3]) == 0
    for parameter in (layer.experts.gate_up_proj, layer.experts.down_proj):
        assert torch.equal(parameter.grad[3], torch.zeros_like(parameter.grad[3]))
        assert all(
            float(grad.abs().max()) > 0 for expert, grad in enumerate(parameter.grad) if stats.counts[expert] > 0
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", [dataclasses.replace(BASE, d_shared=4), SIGMOID], ids=["softmax", "sigmoid"])
def test_autocast_rounds_the_experts_and_never_the_router(spec, dtype):
    layer = make_layer(spec, torch.float32)
    x = draw(2, 7, 6).float()
    plain, exact = layer(x)
    with torch.autocast("cpu", dtype):
        y, stats = layer(x)
        logits = layer.gate(x.flatten(0, 1))
    assert y.dtype == dtype
    assert torch.equal(logits, layer.gate(x.flatten(0, 1)))
    assert all(torch.equal(a, b) for a, b in zip(stats, exact, strict=True))
    assert stats.aux.dtype == torch.float32
    assert relative_error(y, plain) < 3e-2
    (y.float().square().sum() + stats.aux).backward()
    got = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    (plain.square().sum() + exact.aux).backward()
    assert_near(got, {name: parameter.grad for name, parameter in layer.named_parameters()}, 5e-2)


def test_half_precision_activations_are_routed_in_float32():
    layer = make_layer(BASE, torch.bfloat16)
    x = draw(2, 7, 6).bfloat16()
    y, stats = layer(x)
    assert y.dtype == torch.bfloat16
    assert stats.balance_loss.dtype == torch.float32
    assert torch.equal(layer.gate(x.flatten(0, 1)), x.flatten(0, 1).float() @ layer.gate.weight.float().t())


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_names_and_shapes(activation, router):
    layer = MoE(dataclasses.replace(BASE, activation=activation, router=router, d_shared=10))
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    want = {"gate.weight": (8, 6), "experts.down_proj": (8, 6, 5)}
    want |= {"experts.gate_up_proj": (8, 10, 6)} if activation == "swiglu" else {"experts.up_proj": (8, 5, 6)}
    want |= {"gate.e_score_correction_bias": (8,)} if router == "sigmoid" else {}
    want |= {"shared_experts.up_proj.weight": (10, 6), "shared_experts.down_proj.weight": (6, 10)}
    want |= {"shared_experts.gate_proj.weight": (10, 6)} if activation == "swiglu" else {}
    assert shapes == want
    specs = layer.param_specs()
    assert specs.keys() == dict(layer.named_parameters()).keys()
    assert (specs["gate.weight"].role, specs["gate.weight"].decay, specs["gate.weight"].dtype) == (
        "vector",
        True,
        "fp32",
    )
    assert {declared.role for name, declared in specs.items() if name != "gate.weight"} == {"matrix"}
    if activation == "swiglu":
        assert specs["experts.gate_up_proj"].row_blocks == (5, 5)


@pytest.mark.parametrize(("activation", "matrices"), [("swiglu", 3), ("relu2", 2)])
def test_flops_count_the_router_the_chosen_experts_and_the_shared_ones(activation, matrices):
    layer = MoE(dataclasses.replace(BASE, activation=activation, d_shared=10))
    assert layer.flops("decode") == layer.flops("prefill") == 2 * (6 * 8 + 3 * matrices * 6 * 5 + matrices * 6 * 10)
    assert layer.flops("train") == 3 * layer.flops("prefill")
    assert MoE(dataclasses.replace(BASE, activation=activation)).flops("prefill") == 2 * (6 * 8 + 3 * matrices * 6 * 5)


@pytest.mark.parametrize(("residual", "factor"), [("depth", 1 / math.sqrt(10)), ("zero", 0.0), ("none", 1.0)])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_reset_draws_every_parameter_and_empties_the_bias(activation, residual, factor):
    spec = dataclasses.replace(SIGMOID, activation=activation, d_model=64, d_expert=48, d_shared=48, n_experts=12)
    layer = MoE(spec)
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.fill_(math.nan)
    torch.manual_seed(0)
    layer.reset_parameters(Init(std=None, residual=residual, n_layers=5))
    assert torch.equal(layer.gate.e_score_correction_bias, torch.zeros(12))
    for name, parameter in layer.named_parameters():
        want = factor * 48**-0.5 if "down_proj" in name else 64**-0.5
        assert float(parameter.detach().std()) == pytest.approx(want, rel=0.05), name
    assert not torch.equal(layer.experts.down_proj[0], layer.experts.down_proj[1]) or residual == "zero"


def moe_config(**changes) -> ModelConfig:
    return ModelConfig(
        d_model=8,
        pattern="T:moe M:moe",
        vocab_multiple=8,
        attention=AttentionConfig(n_heads=2),
        mamba2=Mamba2Config(d_state=3, head_dim=4, chunk=5),
        moe=MoEConfig(n_experts=4, top_k=2, d_expert=6, n_shared_experts=1, **changes),
    )


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_a_model_built_on_meta_and_drawn_has_no_uninitialised_buffer(router):
    model = fresh_model(moe_config(router=router), 13, seed=0, device="cpu")
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    biases = {name: buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")}
    assert len(biases) == (2 if router == "sigmoid" else 0)
    assert all(torch.equal(buffer, torch.zeros(4)) and buffer.dtype == torch.float32 for buffer in biases.values())
    assert {
        name for name, _ in build_model(moe_config(router=router), 13).named_parameters()
    } == model.param_specs().keys()


def test_the_model_sums_the_losses_of_its_layers_and_checkpointing_changes_nothing():
    model = fresh_model(moe_config(router="sigmoid", balance_loss_weight=0.5), 13, seed=0, device="cpu").double()
    ids = torch.randint(13, (2, 9), generator=torch.Generator().manual_seed(1))
    results = []
    for every in (0, 1):
        model.checkpoint_blocks = every
        output = model(ids, targets=ids.roll(-1, 1))
        torch.testing.assert_close(output.aux, output.router[0].aux + output.router[1].aux)
        grads = torch.autograd.grad(output.loss_sum + output.aux * output.n_tokens, list(model.parameters()))
        results.append([output.loss_sum, output.aux, *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_fake_model_can_be_planned():
    """Without memory or data: the operator has a fake kernel, and nothing asks a tensor for its values."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        layer = MoE(SIGMOID)
        y, stats = layer(torch.empty(2, 7, 6, requires_grad=True))
        (y.sum() + stats.aux).backward()
        assert layer.experts.gate_up_proj.grad.shape == (8, 10, 6)
