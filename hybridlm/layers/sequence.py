"""What every layer needs to know about the tokens of one forward, built once by the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from hybridlm.ops.kernels.choice import ALL_TORCH, KernelChoice
from hybridlm.ops.rotary import rotary_angles

_Tables = dict[tuple[int, float, torch.dtype], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class SequenceInfo:
    """The T columns of a forward: the position of each token, which are padding, and where documents begin.

    positions: (B, T) place of each token in its document. past: tokens that the caches of the fullest row hold. starts:
    (B, T) True at the first token of a document, which must see nothing before it; None: no document begins here.
    valid: (B, T) False at padding, which in every row comes before all tokens; such columns change no state, and what a
    layer returns for them is finite and unused. None: no padding. held: (B,) tokens that each row's caches hold; None:
    ``past`` in every row. doc_ids: (B, T) document of each token, meaningless at padding; None as long as documents
    were never given. longest: tokens that the fullest row holds with the new ones; None: ``past`` + T. kernels:
    the backend of each operator.
    """

    positions: Tensor
    past: int = 0
    starts: Tensor | None = None
    valid: Tensor | None = None
    held: Tensor | None = None
    doc_ids: Tensor | None = None
    longest: int | None = None
    kernels: KernelChoice = ALL_TORCH
    _masks: dict[tuple[int | None, int | None], Tensor] = field(default_factory=dict, repr=False, compare=False)
    _angles: _Tables = field(default_factory=dict, repr=False, compare=False)
    _angles_of_one: _Tables = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def contiguous(batch: int, length: int, past: int, device: torch.device) -> SequenceInfo:
        """T tokens that follow ``past`` others, the same in every row."""
        positions = torch.arange(past, past + length, device=device).expand(batch, length)
        return SequenceInfo(positions, past)

    @property
    def plain(self) -> bool:
        """Every row holds the same number of tokens of one document, and none is padding."""
        return self.starts is None and self.valid is None and self.held is None and self.doc_ids is None

    @property
    def span(self) -> int:
        """Tokens that the fullest row holds with the new ones."""
        return self.past + self.positions.shape[1] if self.longest is None else self.longest

    @cached_property
    def padding(self) -> Tensor | None:
        """(B,) columns of padding at the left of each row; None: none anywhere."""
        return None if self.valid is None else self.valid.logical_not().sum(1)

    @cached_property
    def index(self) -> Tensor:
        """(B, T) index of each token in its row, counted from the first one that the caches hold; meaningless at
        padding."""
        columns = torch.arange(self.positions.shape[1], device=self.positions.device)
        before = self.past if self.held is None else self.held.unsqueeze(1)
        shift = 0 if self.padding is None else self.padding.unsqueeze(1)
        return (columns + before - shift).expand(self.positions.shape)

    def rotary(self, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B, T, head_dim / 2) of the tokens' positions, in at least fp32. Made once per forward."""
        tables = self._angles.get((head_dim, theta, dtype))
        if tables is None:
            tables = self._angles[head_dim, theta, dtype] = rotary_angles(self.positions, head_dim, theta, dtype)
        return tables

    def rotary_of_one(self, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """For one token per row, both (B, 1, head_dim): ``x * first + x.roll(head_dim / 2, -1) * second`` rotates x.
        Made once per forward."""
        tables = self._angles_of_one.get((head_dim, theta, dtype))
        if tables is None:
            cos, sin = self.rotary(head_dim, theta, dtype)
            tables = torch.cat((cos, cos), -1), torch.cat((sin.neg(), sin), -1)
            self._angles_of_one[head_dim, theta, dtype] = tables
        return tables

    def visible(self, window: int | None, bounded: int | None = None) -> Tensor:
        """(B, 1, T, S) True where a token may attend to a key: its own past, within the window, in its own document.

        Keys are ordered by their index in the row, S = ``span``; where the cache is ``bounded`` to so many tokens, S =
        bounded + T and the last column is the row's newest token. Padding attends to every key, so that no softmax is
        empty. Made once per forward.
        """
        mask = self._masks.get((window, bounded))
        if mask is None:
            mask = self._masks[window, bounded] = self._visible(window, bounded)
        return mask

    def _visible(self, window: int | None, bounded: int | None) -> Tensor:
        length = self.positions.shape[1]
        query = self.index.unsqueeze(2)  # (B, T, 1)
        if bounded is None:
            key = torch.arange(self.span, device=query.device).view(1, 1, -1)
        else:  # the newest token of every row is last
            key = self.index[:, -1:, None] + torch.arange(1 - bounded - length, 1, device=query.device)
        # A token's position is the number of tokens before it in its document: the first key that it may see. Ids are
        # not compared, so a document may have the id of an earlier one.
        first = torch.zeros_like(query) if self.doc_ids is None else query - self.positions.unsqueeze(2)
        if window is not None:
            first = torch.maximum(first, query - window + 1)
        mask = (key <= query) & (key >= first.clamp_min(0))
        if self.valid is not None:
            mask = mask | self.valid.logical_not().unsqueeze(2)
        return mask.unsqueeze(1)
