"""Each algorithm's update against its definition or torch's own."""

import pytest
import torch
from toy import make, toy, train

from hybridlm.config.optim import OptimConfig, SGDConfig
from hybridlm.layers.init import MATRIX
from hybridlm.optim.optimizer import HybridOptimizer, param_groups


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


def test_lion_moves_by_the_sign_of_a_short_average_and_keeps_a_longer_one():
    """Chen et al. 2023, algorithm 2, in numbers: two steps of one weight."""
    weight = torch.nn.Parameter(torch.tensor([[1.0]]))
    config = OptimConfig(name="lion", lr=0.1, betas=(0.9, 0.99), weight_decay=0.5, clip=None)
    optimizer = HybridOptimizer(param_groups([("w", weight)], {"w": MATRIX}, config), config)
    weight.grad = torch.tensor([[2.0]])
    optimizer.step()  # direction sign(0.2); 1 * (1 - 0.05) - 0.1
    assert weight.item() == pytest.approx(0.85)
    assert optimizer.state[weight]["exp_avg"].item() == pytest.approx(0.02)
    weight.grad = torch.tensor([[-0.1]])
    optimizer.step()  # sign(0.9 * 0.02 - 0.1 * 0.1 = 0.008) is still up
    assert weight.item() == pytest.approx(0.85 * 0.95 - 0.1)
    assert optimizer.state[weight]["exp_avg"].item() == pytest.approx(0.99 * 0.02 - 0.001)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_torchs_sgd_with_decoupled_decay(nesterov):
    ours, theirs = toy(), toy()
    reference = torch.optim.SGD(theirs.parameters(), lr=0.01, momentum=0.9, nesterov=nesterov)
    settings = {"name": "sgd", "lr": 0.01, "clip": None, "sgd": SGDConfig(momentum=0.9, nesterov=nesterov)}
    got, want = train(ours, make(ours, weight_decay=0.0, **settings)), train(theirs, reference)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    decayed = toy()
    train(decayed, make(decayed, weight_decay=0.5, **settings), 1)
    plain = toy()
    train(plain, make(plain, weight_decay=0.0, **settings), 1)
    torch.testing.assert_close(decayed[0].weight, plain[0].weight - 0.01 * 0.5 * toy()[0].weight)
    assert torch.equal(decayed[0].bias, plain[0].bias)
