"""The mixture of experts against its loop over tokens: output, losses, counts and every gradient, for every option and
with padding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from recurrences import assert_near, moe, relative_error
from torch import Tensor

from hybridlm.config.ffns.moe import MoESpec
from hybridlm.layers.ffn import RouterStats
from hybridlm.layers.moe import MoE

SOFTMAX = MoESpec(
    d_model=8,
    n_experts=6,
    top_k=2,
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
    bias_update_rate=1e-3,
)
SIGMOID = replace(SOFTMAX, router="sigmoid")
SPECS = {
    "softmax": SOFTMAX,
    "softmax_unnormalised_scaled": replace(SOFTMAX, norm_topk_prob=False, routed_scaling_factor=1.7),
    "softmax_shared": replace(SOFTMAX, d_shared=7),
    "softmax_top_one": replace(SOFTMAX, top_k=1, norm_topk_prob=False),
    "softmax_all_experts": replace(SOFTMAX, top_k=6),
    "softmax_one_expert": replace(SOFTMAX, n_experts=1, top_k=1, norm_topk_prob=False),
    "softmax_squared_relu": replace(SOFTMAX, activation="relu2", d_shared=4),
    "sigmoid": SIGMOID,
    "sigmoid_unnormalised": replace(SIGMOID, norm_topk_prob=False, d_shared=3),
    "sigmoid_scaled": replace(SIGMOID, routed_scaling_factor=2.5, top_k=3),
    "sigmoid_groups": replace(SIGMOID, n_expert_groups=3, topk_groups=2, top_k=3),
    "sigmoid_one_group_of_two": replace(SIGMOID, n_expert_groups=2, topk_groups=1, activation="relu2"),
    "sigmoid_without_losses": replace(SIGMOID, balance_loss_weight=0.0, z_loss_weight=0.0),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_layer(spec: MoESpec, dtype: torch.dtype = torch.float64) -> MoE:
    """With weights that hide nothing; the selection bias moves many choices."""
    layer = MoE(spec).double()
    with torch.no_grad():
        for i, parameter in enumerate(layer.parameters()):
            parameter.copy_(
                draw(*parameter.shape, seed=i)
                * (1 if parameter.dim() == 2 and len(parameter) == spec.n_experts else 0.5)
            )
        for name, buffer in layer.named_buffers():
            if name == "gate.e_score_correction_bias":
                buffer.copy_(0.4 * draw(*buffer.shape, seed=50))
    return layer.to(dtype)


def tensors_of(layer: MoE) -> dict[str, Tensor]:
    return dict(layer.named_parameters()) | dict(layer.named_buffers())


@every_spec
@pytest.mark.parametrize("padding", [None, [0, 4, 9]], ids=["whole", "padded"])
def test_output_losses_and_every_gradient_are_the_loops(spec, padding):
    layer, x, weights = make_layer(spec), draw(3, 9, 8, seed=60).requires_grad_(), draw(3, 9, 8, seed=61)
    valid = None if padding is None else torch.arange(9) >= torch.tensor(padding)[:, None]
    y, stats = layer(x, valid)
    want, routing = moe(tensors_of(layer), x, spec, valid)
    assert isinstance(stats, RouterStats)
    assert stats.counts.tolist() == routing.counts.tolist()
    assert bool(y.isfinite().all())
    tokens = torch.ones(3, 9, dtype=torch.bool) if valid is None else valid
    leaves, results = {"x": x, **dict(layer.named_parameters())}, []
    for out, losses in ((y, stats), (want, routing)):
        values = {"y": out[tokens], "balance": losses.balance_loss, "z": losses.z_loss, "aux": losses.aux}
        total = (out * weights)[tokens].sum() + 3 * losses.aux + 5 * losses.balance_loss + 7 * losses.z_loss
        grads = torch.autograd.grad(total, list(leaves.values()))
        assert int(grads[0][~tokens].count_nonzero()) == 0, "padding receives no gradient"
        results.append(values | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)})
    assert_near(*results, 1e-10)


@every_spec
def test_what_stands_in_padding_does_not_matter(spec):
    layer, x = make_layer(spec), draw(2, 7, 8, seed=60)
    valid = torch.arange(7) >= torch.tensor([3, 0])[:, None]
    other = torch.where(valid[..., None], x, 100 * x.flip(1))
    (y, stats), (y_other, stats_other) = layer(x, valid), layer(other, valid)
    assert relative_error(y_other[valid], y[valid]) < 1e-12
    for got, want in zip(stats_other, stats, strict=True):
        assert relative_error(got, want) < 1e-12


@every_spec
def test_a_forward_of_padding_alone_is_finite(spec):
    layer, x = make_layer(spec), draw(2, 3, 8, seed=60).requires_grad_()
    y, stats = layer(x, torch.zeros(2, 3, dtype=torch.bool))
    assert bool(y.isfinite().all())
    assert all(bool(value.isfinite().all()) for value in stats)
    assert int(stats.counts.sum()) == 0
    grads = torch.autograd.grad(y.sum() * 0 + stats.aux, [x, *layer.parameters()], allow_unused=True)
    assert all(grad is None or bool(grad.isfinite().all()) for grad in grads)


@every_spec
def test_tokens_do_not_meet(spec):
    """A token's output is the same whoever stands beside it."""
    layer, x = make_layer(spec), draw(2, 5, 8, seed=60)
    whole, _ = layer(x)
    for row in range(2):
        for t in range(5):
            assert relative_error(layer(x[row : row + 1, t : t + 1])[0], whole[row : row + 1, t : t + 1]) < 1e-12


@every_spec
def test_float32_is_near(spec):
    layer, x = make_layer(spec, torch.float32), draw(2, 9, 8, seed=60)
    y, stats = layer(x.float())
    want, routing = moe({name: tensor.double() for name, tensor in tensors_of(make_layer(spec)).items()}, x, spec)
    assert y.dtype == torch.float32
    assert relative_error(y, want) < 1e-5
    assert stats.counts.tolist() == routing.counts.tolist()
    assert float(stats.aux) == pytest.approx(float(routing.aux), rel=1e-5, abs=1e-7)


def test_a_router_that_sends_all_tokens_everywhere_is_balanced():
    """With every expert chosen by every token the balance loss is one, whatever the logits."""
    assert float(make_layer(SPECS["softmax_all_experts"])(draw(2, 9, 8, seed=60))[1].balance_loss) == pytest.approx(1)
