"""The cost of a configuration, counted on one meta-device layer of each kind, so that thousands can be evaluated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache

import torch

from hybridlm.config.layers import LayerSpec
from hybridlm.config.model import ModelConfig
from hybridlm.config.run import RunConfig
from hybridlm.layers.init import Init
from hybridlm.memory.vocabulary import planned_vocabulary
from hybridlm.model.build import build_block
from hybridlm.model.count import block_flops, flops_per_token, parameters
from hybridlm.model.lm import HybridLM


def cost_function(config: RunConfig) -> Callable[[ModelConfig], int]:
    """What ``config`` matches of a whole model, including embedding and head: parameters, or FLOPs per training token.
    The function raises ConfigError for an illegal model."""
    base, by, context = config.model, config.sweep.match, config.data.seq_len
    vocabulary = planned_vocabulary(config).ids

    @cache
    def layer(spec: LayerSpec) -> float:
        with torch.device("meta"):
            block = build_block(spec, base.model_copy(update={"d_model": spec.params.d_model}))
        return parameters(block) if by == "params" else block_flops(block, context, "train")

    @cache
    def ends(d_model: int) -> float:
        """Embedding, last norm and head."""
        model = base.model_copy(update={"d_model": d_model})
        with torch.device("meta"):
            built = HybridLM(model, [], vocabulary, Init(std=None, residual="none", n_layers=1))
        return parameters(built) if by == "params" else flops_per_token(built, context, "train")

    def cost(model: ModelConfig) -> int:
        return round(ends(model.d_model) + sum(count * layer(spec) for spec, count in Counter(model.layers).items()))

    return cost
