"""Synthetic tasks that ask whether a model can do one thing, generated on the spot: so far parity."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Probe(NamedTuple):
    """ids: (B, T) what the model reads; targets: (B, T) what it must answer at each token, -100 where nothing is asked."""

    ids: Tensor
    targets: Tensor


def parity(batch: int, length: int, generator: torch.Generator) -> Probe:
    """Random bits; after each of them, is the number of ones so far odd? Both are ids 0 and 1.

    A state that only decays towards what it reads cannot flip its sign at every one; a rotating state can (Mamba-3, Lahoti et al. 2026).
    """
    bits = torch.randint(2, (batch, length), generator=generator)
    return Probe(bits, bits.cumsum(1) % 2)
