"""The contract of a feed-forward network: what happens to each token by itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn

from hybridlm.layers.init import Init, ParamSpec
from hybridlm.layers.mixer import Phase


class RouterStats(NamedTuple):
    """What a mixture of experts reports of one forward; returned through block and model, never kept on a module."""

    balance_loss: Tensor  # scalar, 1 when balanced
    z_loss: Tensor  # scalar
    aux: Tensor  # scalar: both with their weights, to be added to the mean loss per token
    counts: Tensor  # (E,) tokens per expert


class FFN(nn.Module, ABC):
    """A feed-forward network of any kind."""

    @abstractmethod
    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, RouterStats | None]:
        """x: (B, T, D), normalised; valid: (B, T), False where a token is padding. Returns (B, T, D) and, of a router,
        its statistics."""

    @abstractmethod
    def flops(self, phase: Phase) -> float:
        """Matrix-product FLOPs per token. A multiply-add counts two."""

    @abstractmethod
    def reset_parameters(self, init: Init) -> None:
        """Draws every parameter anew."""

    @abstractmethod
    def param_specs(self) -> dict[str, ParamSpec]:
        """One entry for every parameter, by its name in this module."""
