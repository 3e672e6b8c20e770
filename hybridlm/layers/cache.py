"""What each kind of mixer remembers between calls. Caches are owned by the caller and changed in place.

A cache never knows its position: the model does (``ModelCache``) and passes it in ``SequenceInfo.past``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class LayerCache(ABC):
    """A mixer's memory: tensors whose first axis is the batch."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor held, by name; their bytes are what ``Mixer.state_bytes`` predicts."""

    @abstractmethod
    def replace(self, tensors: dict[str, Tensor]) -> None:
        """Takes over tensors of the same names (a selection of rows, or loaded ones)."""


class AttentionCache(LayerCache):
    """Keys (after rotation) and values, each (B, capacity, H_kv, P).

    Without a window the columns are the positions themselves. With a window only the last ``window - 1`` tokens are kept, moved left
    as new ones arrive: no query can see further back.
    """

    def __init__(
        self, batch: int, max_len: int, n_kv_heads: int, head_dim: int, window: int | None, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.bounded = window is not None and window <= max_len
        capacity = window - 1 if window is not None and self.bounded else max_len
        self.k = torch.zeros(batch, capacity, n_kv_heads, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)

    def tensors(self) -> dict[str, Tensor]:
        return {"k": self.k, "v": self.v}

    def replace(self, tensors: dict[str, Tensor]) -> None:
        self.k, self.v = tensors["k"], tensors["v"]

    def append(self, k: Tensor, v: Tensor, past: int) -> tuple[Tensor, Tensor]:
        """Adds (B, T, H_kv, P) keys and values after ``past`` tokens; returns all that the T queries may look at, newest last."""
        if not self.bounded:
            end = past + k.shape[1]
            if end > self.k.shape[1]:
                raise ValueError(f"the cache holds {self.k.shape[1]} tokens, {end} are needed: make it with a larger max_len")
            self.k[:, past:end], self.v[:, past:end] = k, v
            return self.k[:, :end], self.v[:, :end]
        capacity = self.k.shape[1]
        kept = min(past, capacity)
        seen_k, seen_v = torch.cat((self.k[:, :kept].to(k.dtype), k), 1), torch.cat((self.v[:, :kept].to(v.dtype), v), 1)
        stay = min(seen_k.shape[1], capacity)
        self.k[:, :stay], self.v[:, :stay] = seen_k[:, seen_k.shape[1] - stay :], seen_v[:, seen_v.shape[1] - stay :]
        return seen_k, seen_v


class Mamba2Cache(LayerCache):
    """conv: (B, K - 1, conv channels), the last inputs of the convolution, oldest first; ssm: (B, H, P, N), at least fp32."""

    def __init__(self, conv: Tensor, ssm: Tensor) -> None:
        self.conv, self.ssm = conv, ssm

    def tensors(self) -> dict[str, Tensor]:
        return {"conv": self.conv, "ssm": self.ssm}

    def replace(self, tensors: dict[str, Tensor]) -> None:
        self.conv, self.ssm = tensors["conv"], tensors["ssm"]
