"""What each kind of mixer remembers between calls. Caches are owned by the caller and changed in place.

A cache never knows its position: the model does (``ModelCache``) and passes it in ``SequenceInfo``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from hybridlm.layers.sequence import SequenceInfo
from hybridlm.ops.dispatch import gradient_wanted
from hybridlm.ops.norm import as_dtype
from hybridlm.ops.padding import after_padding


class LayerCache(ABC):
    """A mixer's memory: tensors whose first axis is the batch."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor held, by name; their bytes are what ``Mixer.state_bytes`` predicts."""

    @abstractmethod
    def replace(self, tensors: dict[str, Tensor]) -> None:
        """Takes over tensors of the same names (a selection of rows, or loaded ones)."""

    @abstractmethod
    def grow(self, max_len: int, lengths: Tensor) -> None:
        """Makes room for ``max_len`` tokens a row. lengths: (B,) tokens that each row holds."""

    @property
    def has_columns(self) -> bool:
        """Whether the second axis of its tensors has a place for every token that a row may hold."""
        return False


class TokenCache(LayerCache):
    """What attention keeps of every token: named tensors (B, capacity, ...), a column per token.

    Without a window a token's column is its index in the row. With a window only the last ``window - 1`` tokens are
    kept, the newest in the last column, moved left as new ones arrive: no query can see further back.
    """

    def __init__(
        self,
        shapes: dict[str, tuple[int, ...]],
        batch: int,
        max_len: int,
        window: int | None,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """shapes: what is kept of one token, by name."""
        self.window = window
        self.bounded = window - 1 if window is not None and window <= max_len else None
        self.capacity = max_len if self.bounded is None else self.bounded
        self._kept = {name: self._columns(batch, shape, dtype, device, self.capacity) for name, shape in shapes.items()}

    @staticmethod
    def _columns(batch: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, capacity: int) -> Tensor:
        """Zeros (B, capacity, ...). The columns of a head are contiguous: a query reads its keys in one pass."""
        *heads, width = shape
        return torch.zeros(batch, *heads, capacity, width, dtype=dtype, device=device).movedim(-2, 1)

    @property
    def has_columns(self) -> bool:
        return self.bounded is None

    def tensors(self) -> dict[str, Tensor]:
        return dict(self._kept)

    def replace(self, tensors: dict[str, Tensor]) -> None:
        self._kept = {name: tensors[name] for name in self._kept}

    def grow(self, max_len: int, lengths: Tensor) -> None:
        """Where the window is now no longer than ``max_len`` the cache becomes a bounded one."""
        if self.bounded is not None or max_len <= self.capacity:
            return
        if self.window is None or self.window > max_len:
            for name, kept in self._kept.items():
                self._kept[name] = self._columns(len(kept), kept.shape[2:], kept.dtype, kept.device, max_len)
                self._kept[name][:, : self.capacity] = kept
            self.capacity = max_len
            return
        self.bounded = self.window - 1
        newest = lengths.unsqueeze(1) + torch.arange(
            -self.bounded, 0, device=lengths.device
        )  # (B, bounded), negative: no token
        for name, kept in self._kept.items():
            tail = (1,) * (kept.dim() - 2)
            index = newest.clamp_min(0).view(*newest.shape, *tail).expand(-1, -1, *kept.shape[2:])
            self._kept[name] = self._columns(len(kept), kept.shape[2:], kept.dtype, kept.device, self.bounded)
            self._kept[name].copy_(kept.gather(1, index))
        self.capacity = self.bounded

    def append(self, new: dict[str, Tensor], seq: SequenceInfo) -> dict[str, Tensor]:
        """Adds (B, T, ...) of the new tokens; returns all that they may attend to, in the new tensors' dtype and newest
        last.

        The columns are those of ``seq.visible``; where ``seq.plain`` there are none before the row's first token.
        ValueError where a row would hold more than ``max_len`` tokens.
        """
        if self.bounded is None:
            self._check_room(seq.span)
        step = self._shift_in if self.bounded is not None else self._place
        return {name: step(self._kept[name], tensor, seq) for name, tensor in new.items()}

    def append_one(self, new: dict[str, Tensor], column: int) -> dict[str, Tensor]:
        """``append`` of one token (B, heads, width) to the same column of every row of a cache that is not bounded; the
        columns up to it, (B, heads, S, width). ValueError as for ``append``."""
        self._check_room(column + 1)
        seen = {}
        for name, token in new.items():
            kept = self._kept[name].transpose(1, 2)
            kept.select(2, column).copy_(token)
            seen[name] = kept.narrow(2, 0, column + 1)
        return seen

    def _check_room(self, tokens: int) -> None:
        if tokens > self.capacity:
            raise ValueError(
                f"the cache holds {self.capacity} tokens, {tokens} are needed: make it with a larger max_len"
            )

    def _shift_in(self, kept: Tensor, new: Tensor, seq: SequenceInfo) -> Tensor:
        """Bounded: the newest tokens are last, in every row."""
        wide = torch.promote_types(kept.dtype, new.dtype)  # what a row keeps must not be rounded on its way
        before = kept[:, self.capacity - min(seq.past, self.capacity) :] if seq.plain else kept
        seen = after_padding(before.to(wide), new.to(wide), seq.padding)
        stay = min(seen.shape[1], self.capacity)
        kept[:, self.capacity - stay :] = seen[:, seen.shape[1] - stay :]
        return seen.to(new.dtype)

    def _place(self, kept: Tensor, new: Tensor, seq: SequenceInfo) -> Tensor:
        """Every token in the column of its index, padding nowhere."""
        if seq.valid is None and seq.held is None:
            kept[:, seq.past : seq.span] = new
        else:
            recent = slice(-self.capacity, None)  # a row has no more tokens than this, and they are last
            # T consecutive indices, taken modulo the capacity, are T different columns: padding gets some that its row
            # does not fill, and writes back what is there.
            index = seq.index[:, recent].remainder(self.capacity)
            tail = (1,) * (new.dim() - 2)
            index = index.view(*index.shape, *tail).expand(-1, -1, *new.shape[2:])
            token = new[:, recent].to(kept.dtype)
            if seq.valid is not None:
                valid = seq.valid[:, recent]
                token = torch.where(valid.view(*valid.shape, *tail), token, kept.gather(1, index))
            kept.scatter_(1, index, token)
        return as_dtype(kept[:, : seq.span], new.dtype)


class StateCache(LayerCache):
    """What a Mamba keeps of a row, whatever its length: named tensors (B, ...).

    conv: (B, K - 1, channels), the last inputs of the convolution, oldest first, in the activations' dtype. The others
    are the scan's state, in at least fp32: ssm, whose shape is the mixer's own, and Mamba-3's angle, k and v.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._kept = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._kept[name]

    def tensors(self) -> dict[str, Tensor]:
        return dict(self._kept)

    def replace(self, tensors: dict[str, Tensor]) -> None:
        self._kept = {name: tensors[name] for name in self._kept}

    def grow(self, max_len: int, lengths: Tensor) -> None:
        """A state has room for any number."""

    def update(self, tensors: dict[str, Tensor]) -> None:
        """Overwrites these states in place, unless a scan has already done so. Those that autograd records replace the
        old ones, which the backward still needs."""
        for name, tensor in tensors.items():
            kept = self._kept[name]
            if gradient_wanted(tensor):
                self._kept[name] = as_dtype(tensor, kept.dtype)
            elif tensor is not kept:
                kept.copy_(tensor)
