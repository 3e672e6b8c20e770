"""The loss of DPO and its gradient against a second formulation in float64, and with respect to a whole model."""

from __future__ import annotations

import math

import pytest
import torch

from hybridlm.ops.preference import dpo_losses


def by_hand(policy, reference, beta):
    """One pair at a time: the loss in the other form, log(1 + exp(-h)), and its gradient with respect to the four."""
    losses, gradient = [], []
    for (chosen, rejected), (ref_chosen, ref_rejected) in zip(policy, reference, strict=True):
        margin = beta * ((chosen - rejected) - (ref_chosen - ref_rejected))
        losses.append(max(-margin, 0) + math.log1p(math.exp(-abs(margin))))
        weight = beta / (1 + math.exp(margin)) if margin < 0 else beta * math.exp(-margin) / (1 + math.exp(-margin))
        gradient += [-weight, weight]
    return losses, gradient


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.5])
@pytest.mark.parametrize("scale", [1.0, 30.0, 800.0])
def test_loss_and_gradient_are_those_of_the_paper(beta, scale):
    generator = torch.Generator().manual_seed(3)
    policy, reference = (-scale * torch.rand(16, generator=generator, dtype=torch.float64) for _ in range(2))
    policy.requires_grad_()
    losses, rewards = dpo_losses(policy, reference, beta)
    losses.sum().backward()
    want, gradient = by_hand(policy.view(-1, 2).tolist(), reference.view(-1, 2).tolist(), beta)
    assert torch.allclose(losses, torch.tensor(want, dtype=torch.float64), rtol=1e-13, atol=1e-13)
    assert torch.allclose(policy.grad, torch.tensor(gradient, dtype=torch.float64), rtol=1e-12, atol=1e-15)
    assert torch.allclose(rewards.view(-1), beta * (policy - reference), rtol=1e-13)


def test_where_nothing_has_been_learned_the_loss_is_ln_2():
    same = -torch.arange(6.0, dtype=torch.float64)
    losses, rewards = dpo_losses(same, same, 0.3)
    assert torch.allclose(losses, torch.full((3,), math.log(2), dtype=torch.float64))
    assert not rewards.any()
