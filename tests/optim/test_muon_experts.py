"""Muon on the matrices of experts: each expert, and each projection fused into its rows, as if it were a parameter of
its own."""

from __future__ import annotations

import pytest
import torch

from hybridlm.config.optim import MuonConfig, OptimConfig
from hybridlm.layers.init import VECTOR, ParamSpec
from hybridlm.optim.muon import muon_updates, orthogonalize
from hybridlm.optim.optimizer import HybridOptimizer, param_groups


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_every_expert_and_every_block_of_its_rows_is_orthogonalised_separately():
    experts, down, plain = draw(3, 10, 6), draw(3, 6, 5, seed=1), draw(5, 6, seed=2)
    got = muon_updates([experts, down, plain], [(5, 5), (), ()], 5)
    assert [tuple(update.shape) for update in got] == [(3, 10, 6), (3, 6, 5), (5, 6)]
    for e in range(3):
        halves = [orthogonalize(half, 5) for half in experts[e].split(5)]
        torch.testing.assert_close(got[0][e], torch.cat(halves))
        torch.testing.assert_close(got[1][e], orthogonalize(down[e], 5) * (6 / 5) ** 0.5)
    torch.testing.assert_close(got[2], orthogonalize(plain, 5))


def test_an_expert_without_a_gradient_is_left_alone():
    gradient = draw(3, 6, 5)
    gradient[1] = 0.0
    (update,) = muon_updates([gradient], [()], 5)
    assert torch.equal(update[1], torch.zeros(6, 5))
    assert all(float(torch.linalg.svdvals(update[e]).min()) > 0.3 for e in (0, 2))


@pytest.mark.parametrize("blocks", [(), (4, 4)])
def test_experts_in_one_tensor_train_as_experts_in_many(blocks):
    """Momentum, decay and learning rate included; the router beside them is AdamW's."""
    config = OptimConfig(name="muon", weight_decay=0.2, clip=None, muon=MuonConfig(lr=0.05))
    start = draw(3, 8, 5)
    matrix, router = (
        ParamSpec(decay=True, role="matrix", row_blocks=blocks),
        ParamSpec(decay=True, role="vector", dtype="fp32"),
    )
    stacked = {"experts": torch.nn.Parameter(start.clone()), "gate": torch.nn.Parameter(draw(3, 5))}
    apart = {f"expert{e}": torch.nn.Parameter(start[e].clone()) for e in range(3)} | {
        "norm": torch.nn.Parameter(torch.ones(2))
    }
    optimizers = [
        HybridOptimizer(param_groups(parameters.items(), specs, config), config)
        for parameters, specs in (
            (stacked, {"experts": matrix, "gate": router}),
            (apart, {f"expert{e}": matrix for e in range(3)} | {"norm": VECTOR}),
        )
    ]
    algorithms = {group["name"]: group["algorithm"] for group in optimizers[0].param_groups}
    assert algorithms == {"matrix": "muon", "vector": "adamw"}
    for step in range(4):
        gradient = draw(3, 8, 5, seed=10 + step)
        stacked["experts"].grad, stacked["gate"].grad = gradient, draw(3, 5, seed=step)
        apart["norm"].grad = torch.ones(2)
        for e in range(3):
            apart[f"expert{e}"].grad = gradient[e]
        for optimizer in optimizers:
            optimizer.step()
    for e in range(3):
        torch.testing.assert_close(stacked["experts"][e], apart[f"expert{e}"])
    assert not torch.equal(stacked["gate"], draw(3, 5))
