"""What every layer needs to know about the tokens of one forward, built once by the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SequenceInfo:
    """positions: (B, T) place of each token in its document; past: columns that the caches already hold."""

    positions: Tensor
    past: int = 0

    @staticmethod
    def contiguous(batch: int, length: int, past: int, device: torch.device) -> SequenceInfo:
        """T tokens that follow ``past`` others, the same in every row."""
        positions = torch.arange(past, past + length, device=device).expand(batch, length)
        return SequenceInfo(positions, past)
