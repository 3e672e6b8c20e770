"""A model of two layers and its optimizer."""

import torch

from hybridlm.config.optim import OptimConfig
from hybridlm.layers.init import MATRIX, VECTOR
from hybridlm.optim.optimizer import HybridOptimizer, param_groups


def toy(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 3))


SPECS = {"0.weight": MATRIX, "0.bias": VECTOR, "1.weight": MATRIX, "1.bias": VECTOR}


def train(model, optimizer, steps=5):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 6, generator=generator).to(model[0].weight.dtype)).square().sum().backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def make(model, **fields):
    config = OptimConfig(**fields)
    return HybridOptimizer(param_groups(model.named_parameters(), SPECS, config), config)
