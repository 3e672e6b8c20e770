"""The cache of a whole model: one per layer, and the position of every row, which only the model advances."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hybridlm.layers.cache import LayerCache
from hybridlm.layers.sequence import SequenceInfo

NO_DOCUMENT = -1  # what stood last in an empty row


class ModelCache:
    """layers: one cache per layer. past: tokens that the fullest row holds. lengths: (B,) tokens that each row holds.

    next_position: (B,) position of a row's next token in its document, if that continues. last_doc: (B,) document of
    each row's newest token; None until documents are given. ragged: rows may hold different numbers of tokens.
    """

    def __init__(self, layers: list[LayerCache], batch: int, device: torch.device) -> None:
        self.layers = layers
        self.past = 0
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.next_position = torch.zeros_like(self.lengths)
        self.last_doc: Tensor | None = None
        self.ragged = False

    def open_doc(self) -> Tensor:
        """(B,) ``last_doc``, 0 where none were given; ``NO_DOCUMENT`` where the row is empty."""
        return torch.where(self.lengths > 0, 0 if self.last_doc is None else self.last_doc, NO_DOCUMENT)

    def advance(self, seq: SequenceInfo) -> None:
        """Called by the model after a forward over the columns of ``seq``."""
        length = seq.positions.shape[1]
        if seq.plain:
            self.past += length
            self.lengths += length
            self.next_position += length
            return
        follows = seq.positions[:, -1] + 1  # padding comes first: the last column is a token, or the row has none
        newest = (
            None if seq.doc_ids is None else seq.doc_ids[:, -1].to(torch.long, copy=True)
        )  # not a view of what the caller gave
        if seq.padding is not None:
            some = seq.padding < length
            if newest is not None:
                newest = torch.where(some, newest, self.open_doc())
            follows = torch.where(some, follows, self.next_position)
            self.ragged = True
        # In place, for a view.
        self.lengths += length if seq.padding is None else length - seq.padding
        self.next_position.copy_(follows)
        self.last_doc, self.past = newest, seq.span

    @property
    def bytes(self) -> int:
        """Bytes allocated for all layers."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.tensors().values())

    def select(self, rows: Tensor) -> ModelCache:
        """A new cache of these rows (long indices; a row may come twice): to branch one prompt into several samples."""
        return self._mapped(lambda tensor: tensor.index_select(0, rows))

    def view(self, first: int, rows: int) -> ModelCache:
        """``rows`` rows from ``first`` on, in this cache's own memory: tokens given to the view are in this cache,
        which must not be used itself while the view is in use. The view is valid until this cache grows."""
        return self._mapped(lambda tensor: tensor.narrow(0, first, rows))

    def _mapped(self, rows_of: Callable[[Tensor], Tensor]) -> ModelCache:
        """A cache of what ``rows_of`` makes of every tensor of this one."""
        layers = []
        for layer in self.layers:
            chosen = object.__new__(type(layer))
            chosen.__dict__.update(layer.__dict__)
            chosen.replace({name: rows_of(tensor) for name, tensor in layer.tensors().items()})
            layers.append(chosen)
        cache = ModelCache(layers, 0, self.lengths.device)
        cache.lengths, cache.next_position = rows_of(self.lengths), rows_of(self.next_position)
        cache.last_doc = None if self.last_doc is None else rows_of(self.last_doc)
        cache._count()
        return cache

    def grow(self, max_len: int) -> None:
        """Makes room for ``max_len`` tokens a row, keeping what is there; a layer that has room for them stays as it
        is."""
        for layer in self.layers:
            layer.grow(max_len, self.lengths)

    def insert(self, row: int, other: ModelCache) -> None:
        """Overwrites one row with the only row of ``other``, which must have been made with the same max_len.

        The two may hold different numbers of tokens, and only one of them may know documents.
        """
        for mine, its in zip(self.layers, other.layers, strict=True):
            for name, tensor in its.tensors().items():
                mine.tensors()[name][row] = tensor[0]
        if self.last_doc is not None or other.last_doc is not None:
            self.last_doc = self.open_doc()
            self.last_doc[row] = other.open_doc()[0]
        self.lengths[row], self.next_position[row] = other.lengths[0], other.next_position[0]
        self._count()

    def piece(self, start: int) -> list[dict[str, Tensor]]:
        """Copies of what the tokens from ``start`` on left in each layer of a cache of one row: their columns, or the
        whole state of a layer whose memory has no columns."""
        return [
            {
                name: (tensor[:, start : self.past] if layer.has_columns else tensor).clone()
                for name, tensor in layer.tensors().items()
            }
            for layer in self.layers
        ]

    def fill(self, pieces: Sequence[list[dict[str, Tensor]]], tokens: int) -> None:
        """Brings a new cache of one row, without documents, to the state after ``tokens`` tokens, given the ``piece``
        of each stretch of them, of caches that had the same layers with columns."""
        for place, layer in enumerate(self.layers):
            for name, tensor in layer.tensors().items():
                if layer.has_columns:
                    torch.cat([piece[place][name] for piece in pieces], 1, out=tensor[:, :tokens])
                else:
                    tensor.copy_(pieces[-1][place][name])
        self.lengths.fill_(tokens)
        self.next_position.fill_(tokens)
        self._count()

    def _count(self) -> None:
        """Brings ``past`` and ``ragged`` in line with ``lengths``."""
        if len(self.lengths):
            least, self.past = (int(count) for count in self.lengths.aminmax())
            self.ragged = least != self.past

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to continue later, as tensors; they are this cache's own, and change when it is used."""
        state = {
            f"layers.{i}.{name}": tensor
            for i, layer in enumerate(self.layers)
            for name, tensor in layer.tensors().items()
        }
        state |= {"lengths": self.lengths, "next_position": self.next_position}
        return state if self.last_doc is None else {**state, "last_doc": self.last_doc}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of ``state_dict``; shapes must be those of this cache (KeyError, ValueError)."""
        mine = self.state_dict()
        mine.pop("last_doc", None)
        for name, tensor in mine.items():
            if state[name].shape != tensor.shape:
                raise ValueError(f"{name} has shape {tuple(state[name].shape)}, this cache {tuple(tensor.shape)}")
        for name, tensor in mine.items():
            tensor.copy_(state[name])
        self.last_doc = state["last_doc"].to(self.lengths.device, copy=True) if "last_doc" in state else None
        self._count()
