"""The contract of a feed-forward network: a function of each token alone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from hybridlm.layers.layer import Layer, Phase


class RouterStats(NamedTuple):
    """What a mixture of experts reports of one forward; returned through block and model, never kept on a module."""

    balance_loss: Tensor  # scalar, 1 when balanced
    z_loss: Tensor  # scalar
    aux: Tensor  # scalar: both with their weights, to be added to the mean loss per token
    counts: Tensor  # (E,) tokens per expert


class FFN(Layer):
    """A feed-forward network of any kind. One with a router has ``n_experts``, ``top_k`` and ``balancing``."""

    n_experts: int = 0  # 0: no router
    top_k: int = 0  # experts per token
    balancing: str = ""  # the field, of the model section, that spreads the load over experts

    @abstractmethod
    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, RouterStats | None]:
        """x: (B, T, D), normalised; valid: (B, T), False where a token is padding. Returns (B, T, D) and, from a
        router, its statistics."""

    def prepare(self) -> Callable[[Tensor], Tensor]:
        """``step(x (B, D)) -> (B, D)`` for one token per row; see ``Mixer.prepare``."""
        return lambda x: self(x.unsqueeze(1))[0].squeeze(1)

    @abstractmethod
    def flops(self, phase: Phase) -> float:
        """Matrix-product FLOPs per token. A multiply-add counts two."""

    def balance(self, counts: Tensor) -> None:
        """What a router changes after an optimizer step that was not skipped. counts: (E,) tokens per expert in that
        step, over all ranks."""
