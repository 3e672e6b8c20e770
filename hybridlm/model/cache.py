"""The cache of a whole model: one per layer, and the position, which only the model advances."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm.layers.cache import LayerCache


class ModelCache:
    """layers: one cache per layer; lengths: (B,) tokens seen by each row; past: columns filled, the same for every row."""

    def __init__(self, layers: list[LayerCache], batch: int, device: torch.device) -> None:
        self.layers = layers
        self.past = 0
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)

    def advance(self, tokens: int) -> None:
        """Called by the model after a forward over so many columns."""
        self.past += tokens
        self.lengths += tokens

    @property
    def bytes(self) -> int:
        """Bytes allocated for all layers."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.tensors().values())

    def select(self, rows: Tensor) -> ModelCache:
        """A new cache of these rows (long indices; a row may come twice): to branch one prompt into several samples."""
        layers = []
        for layer in self.layers:
            chosen = object.__new__(type(layer))
            chosen.__dict__.update(layer.__dict__)
            chosen.replace({name: tensor.index_select(0, rows) for name, tensor in layer.tensors().items()})
            layers.append(chosen)
        cache = ModelCache(layers, len(rows), self.lengths.device)
        cache.past, cache.lengths = self.past, self.lengths.index_select(0, rows)
        return cache

    def insert(self, row: int, other: ModelCache) -> None:
        """Overwrites one row with the only row of ``other``, which must stand at the same column."""
        if other.past != self.past:
            raise ValueError(f"the inserted row stands at column {other.past}, this cache at {self.past}")
        for mine, its in zip(self.layers, other.layers, strict=True):
            for name, tensor in its.tensors().items():
                mine.tensors()[name][row] = tensor[0]
        self.lengths[row] = other.lengths[0]

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to go on later, as tensors."""
        state = {f"layers.{i}.{name}": tensor for i, layer in enumerate(self.layers) for name, tensor in layer.tensors().items()}
        return {**state, "lengths": self.lengths, "past": torch.tensor(self.past)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of ``state_dict``; shapes must be those of this cache (KeyError, ValueError)."""
        for i, layer in enumerate(self.layers):
            mine = layer.tensors()
            loaded = {name: state[f"layers.{i}.{name}"] for name in mine}
            for name, tensor in mine.items():
                if loaded[name].shape != tensor.shape:
                    raise ValueError(f"layers.{i}.{name} has shape {tuple(loaded[name].shape)}, this cache {tuple(tensor.shape)}")
                tensor.copy_(loaded[name])
        self.lengths.copy_(state["lengths"])
        self.past = int(state["past"])
