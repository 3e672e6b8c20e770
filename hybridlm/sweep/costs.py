"""The cost of a configuration, counted on one meta-device layer of each kind, so that thousands can be evaluated."""

from __future__ import annotations

from collections import Counter
from typing import Literal

import torch

from hybridlm.config.layers import LayerSpec
from hybridlm.config.model import ModelConfig
from hybridlm.config.resolve import resolve_layers
from hybridlm.layers.init import Init
from hybridlm.model.build import build_block
from hybridlm.model.count import block_flops, flops_per_token, parameters
from hybridlm.model.lm import HybridLM


class Costs:
    """Parameters, or FLOPs per training token, of models with one vocabulary and one context."""

    def __init__(self, by: Literal["params", "flops"], vocab_size: int, context: int) -> None:
        """context: tokens per training window."""
        self._by, self._vocab, self._context = by, vocab_size, context
        self._layers: dict[LayerSpec, float] = {}
        self._ends: dict[int, float] = {}

    def of(self, model: ModelConfig) -> int:
        """The cost of the whole model, including embedding and head. ConfigError: the model is illegal."""
        layers = Counter(resolve_layers(model))
        return round(self._ends_of(model) + sum(count * self._layer(spec, model) for spec, count in layers.items()))

    def _layer(self, spec: LayerSpec, model: ModelConfig) -> float:
        if spec not in self._layers:
            with torch.device("meta"):
                block = build_block(spec, model)
            self._layers[spec] = (
                parameters(block) if self._by == "params" else block_flops(block, self._context, "train")
            )
        return self._layers[spec]

    def _ends_of(self, model: ModelConfig) -> float:
        """Embedding, last norm and head."""
        if model.d_model not in self._ends:
            with torch.device("meta"):
                ends = HybridLM(model, [], self._vocab, Init(std=None, residual="none", n_layers=1))
            self._ends[model.d_model] = (
                parameters(ends) if self._by == "params" else flops_per_token(ends, self._context, "train")
            )
        return self._ends[model.d_model]
