"""What a step minimises and a validation measures: cross-entropy of the next token, or preferences (DPO)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hybridlm.config.optim import OptimConfig
from hybridlm.data.windows.loader import Batch
from hybridlm.data.windows.order import IGNORE
from hybridlm.model.lm import HybridLM, LMOutput
from hybridlm.ops.preference import dpo_losses

# Of preferences: the difference of the rewards of chosen and rejected, how often it is positive, and both rewards.
MEASURES = ("margin", "accuracy", "reward_chosen", "reward_rejected")


class Losses(NamedTuple):
    """Sums over the targets of a micro-batch. total: what is minimised, with the auxiliary loss of routers; loss:
    without it; measured: (4,) float64, MEASURES, of preferences only."""

    total: Tensor
    loss: Tensor
    output: LMOutput
    measured: Tensor | None = None


class Objective(Protocol):
    """What ``optim.objective`` names."""

    def losses(self, model: HybridLM, batch: Batch) -> Losses:
        """Of a micro-batch of training."""

    def sums(self, model: HybridLM, batch: Batch) -> Tensor:
        """(3,) float64 of a micro-batch: loss in nats, targets, and bytes of text that the targets stand for; of
        preferences (7,), without such bytes and with the sums of MEASURES."""


def objective_of(config: OptimConfig) -> Objective:
    return Preferences(config.dpo_beta) if config.objective == "dpo" else NextToken()


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy. A router's auxiliary loss is a mean over the micro-batch, weighted by its number of targets."""

    def losses(self, model: HybridLM, batch: Batch) -> Losses:
        output = model(batch["ids"], doc_ids=batch.get("doc_ids"), targets=batch["targets"])
        total = output.loss_sum if output.aux is None else output.loss_sum + output.aux * output.n_tokens
        return Losses(total, output.loss_sum, output)

    def sums(self, model: HybridLM, batch: Batch) -> Tensor:
        found = self.losses(model, batch)
        assert found.output.n_tokens is not None
        return torch.stack([found.loss.double(), found.output.n_tokens.double(), batch["n_bytes"].double()])


@dataclass(frozen=True)
class Preferences:
    """DPO. The targets are pairs, each two rows of a batch, which carries their log-probabilities under the weights
    that training starts from."""

    beta: float

    def losses(self, model: HybridLM, batch: Batch) -> Losses:
        output = model(batch["ids"], targets=batch["targets"], each=True)
        real = _real(batch)
        losses, rewards = dpo_losses(log_probabilities(output), batch["reference"], self.beta)
        margins = rewards[:, 0] - rewards[:, 1]
        each = torch.stack([margins, (margins > 0).to(margins.dtype), rewards[:, 0], rewards[:, 1]])
        loss = (losses * real).sum()
        total = loss if output.aux is None else loss + output.aux * real.sum()
        return Losses(total, loss, output, (each.detach() * real).sum(dim=1))

    def sums(self, model: HybridLM, batch: Batch) -> Tensor:
        found = self.losses(model, batch)
        assert found.measured is not None
        counted = torch.stack([found.loss, _real(batch).sum().double(), torch.zeros_like(found.loss)])
        return torch.cat([counted, found.measured])


def _real(batch: Batch) -> Tensor:
    """(pairs,) False for what fills up a validation's last batch."""
    return (batch["targets"] != IGNORE).any(dim=1)[::2]


def log_probabilities(output: LMOutput) -> Tensor:
    """(B,) float64: of the targets of each row, in nats."""
    assert output.losses is not None
    return -output.losses.double().sum(dim=1)
