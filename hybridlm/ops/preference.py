"""The loss of direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def dpo_losses(policy: Tensor, reference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """``-log sigmoid(r_chosen - r_rejected)`` of each pair, (B,), and both rewards ``r``, (B, 2), which are
    ``beta (log p - log p_reference)``.

    policy, reference: (2 B,) log-probabilities in nats of whole answers, chosen and rejected of each pair in turn.
    """
    rewards = beta * (policy - reference).view(-1, 2)
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1]), rewards
