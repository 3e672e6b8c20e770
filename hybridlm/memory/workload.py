"""What the memory of a training step depends on, apart from the step's settings."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from hybridlm.config.layers import LayerSpec
from hybridlm.config.model import ModelConfig
from hybridlm.config.optim import OptimConfig
from hybridlm.layers.init import Init
from hybridlm.model.build import build_block
from hybridlm.model.lm import HybridLM

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class Workload:
    """One process's work. vocab: the model's ids; precision: never ``auto``; gpu: rather than a CPU; documents: are
    packed and isolated; sequences: rows of a batch for each window, two for a pair of preferences."""

    model: ModelConfig
    optim: OptimConfig
    vocab: int
    seq_len: int
    precision: str
    gpu: bool
    documents: bool
    sequences: int = 1

    def __hash__(self) -> int:
        return hash(repr(self.model))  # a section that holds mappings has no hash of its own

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        return self.model.layers

    def built(self, layers: tuple[LayerSpec, ...]) -> HybridLM:
        """A model of these layers with its parameters' training dtypes, to be built inside a ``tracked`` block."""
        init = Init(std=None, residual=self.model.init.residual, n_layers=len(layers))
        model = HybridLM(self.model, [build_block(spec, self.model) for spec in layers], self.vocab, init)
        if self.precision == "bf16-true":
            model.round_parameters(torch.bfloat16)
        if self.precision == "64-true":
            for tensor in (*model.parameters(), *model.buffers()):  # Module.double() cannot, with fake tensors
                tensor.data = tensor.data.double()
        return model

    def autocast(self, model: HybridLM) -> AbstractContextManager[object]:
        """The context that Lightning runs a training step in: autocast without its cache of rounded weights."""
        dtype = AUTOCAST.get(self.precision)
        if dtype is None:
            return nullcontext()
        return torch.autocast(model.embedding.weight.device.type, dtype=dtype, cache_enabled=False)
