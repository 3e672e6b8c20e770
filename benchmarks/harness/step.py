"""One training step of any of the models."""

from __future__ import annotations

import torch
from harness.ours import VOCAB
from torch import Tensor, nn

from hybridlm.model.lm import HybridLM


def parameters(model: nn.Module) -> int:
    """Trainable numbers, a tied weight counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


class Step:
    """A model with fused AdamW and a batch of random ids; calling it is one step: forward, loss, backward, update."""

    def __init__(self, model: nn.Module, shape: tuple[int, int]) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(VOCAB, shape, generator=generator)
        self.targets = torch.randint(VOCAB, shape, generator=generator)

    def loss(self) -> Tensor:
        """The mean cross-entropy; of transformers' models as they compute it themselves from labels, which they shift
        by a token."""
        if not isinstance(self.model, HybridLM):
            loss: Tensor = self.model(input_ids=self.ids, labels=self.targets, use_cache=False).loss
            return loss
        output = self.model(self.ids, targets=self.targets)
        assert output.loss_sum is not None
        mean = output.loss_sum / self.targets.numel()
        return mean if output.aux is None else mean + output.aux

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()
