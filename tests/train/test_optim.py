"""Groups, clipping, AdamW against torch's own, Muon against its definition."""

import copy

import pytest
import torch

from hybridlm.config.train import LRScale, MuonConfig, OptimConfig
from hybridlm.layers.init import MATRIX, VECTOR, ParamSpec
from hybridlm.train.muon import muon_updates, orthogonalize
from hybridlm.train.optim import HybridOptimizer, param_groups


def toy(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 3))


SPECS = {"0.weight": MATRIX, "0.bias": VECTOR, "1.weight": MATRIX, "1.bias": VECTOR}


def train(model, optimizer, steps=5):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 6, generator=generator)).square().sum().backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def make(model, **fields):
    config = OptimConfig(**fields)
    return HybridOptimizer(param_groups(model.named_parameters(), SPECS, config), config)


def test_groups_carry_what_their_parameters_declare():
    config = OptimConfig(lr=0.1, weight_decay=0.3, lr_scale=LRScale(vector=0.5), name="muon", muon=MuonConfig(lr=0.7))
    groups = {group["name"]: group for group in param_groups(toy().named_parameters(), SPECS, config)}
    assert {name: (group["lr"], group["weight_decay"], group["algorithm"], len(group["params"])) for name, group in groups.items()} == {
        "matrix": (0.7, 0.3, "muon", 2),
        "vector, no decay": (0.05, 0.0, "adamw", 2),
    }


def test_an_undeclared_parameter_is_an_error():
    with pytest.raises(KeyError):
        param_groups(toy().named_parameters(), {"0.weight": MATRIX}, OptimConfig())


def test_adamw_is_torchs_adamw():
    ours, theirs = toy(), toy()
    decayed = [theirs[0].weight, theirs[1].weight]
    others = [theirs[0].bias, theirs[1].bias]
    reference = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=0.01, betas=(0.9, 0.95)
    )
    got = train(ours, make(ours, lr=0.01, weight_decay=0.1, clip=None))
    want = train(theirs, reference)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_clipping_bounds_the_global_norm_and_reports_the_norm_before():
    model = toy()
    optimizer = make(model, lr=0.01, clip=0.5)
    model(torch.randn(8, 6)).square().sum().backward()
    norm = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm()
    optimizer.step()
    assert norm > 0.5
    torch.testing.assert_close(optimizer.grad_norm, norm)
    clipped = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm()
    torch.testing.assert_close(clipped, torch.tensor(0.5), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_survives_a_round_trip(name):
    whole = toy()
    straight = make(whole, name=name)
    train(whole, straight, 3)
    saved, weights = copy.deepcopy(straight.state_dict()), copy.deepcopy(whole.state_dict())
    want = train(whole, straight, 3)
    resumed = toy(seed=9)
    resumed.load_state_dict(weights)
    optimizer = make(resumed, name=name)
    optimizer.load_state_dict(saved)
    for a, b in zip(train(resumed, optimizer, 3), want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(8, 8), (4, 12), (12, 4)])
def test_orthogonalize_brings_singular_values_near_one_and_keeps_the_directions(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    result = orthogonalize(matrix, 8)
    values = torch.linalg.svdvals(result)
    assert float(values.min()) > 0.5
    assert float(values.max()) < 1.3
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ result @ vh.T
    assert float((inner - inner.diagonal().diag()).abs().max()) < 1e-6


def test_fused_projections_are_orthogonalised_block_by_block():
    torch.manual_seed(0)
    fused, plain = torch.randn(10, 6), torch.randn(4, 6)
    got = muon_updates([fused, plain], [(4, 6), ()], 5)
    parts = [orthogonalize(fused[:4], 5), orthogonalize(fused[4:], 5)]
    torch.testing.assert_close(got[0], torch.cat(parts))
    torch.testing.assert_close(got[1], orthogonalize(plain, 5))


def test_muon_leaves_vectors_and_embeddings_to_adamw():
    specs = {**SPECS, "0.weight": ParamSpec(decay=False, role="embedding")}
    config = OptimConfig(name="muon")
    algorithms = {group["name"]: group["algorithm"] for group in param_groups(toy().named_parameters(), specs, config)}
    assert algorithms == {"embedding, no decay": "adamw", "vector, no decay": "adamw", "matrix": "muon"}
