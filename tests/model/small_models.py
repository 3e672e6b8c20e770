"""Models of a few thousand parameters for the tests of the whole model."""

from __future__ import annotations

import torch
from recurrences import language_model
from torch import Tensor

from hybridlm.config.model import AttentionConfig, Mamba2Config, MLPConfig, ModelConfig
from hybridlm.config.resolve import resolve_layers
from hybridlm.model.build import build_model
from hybridlm.model.lm import HybridLM

VOCAB = 13  # padded to 16


def small_config(pattern: str = "MTM", **changes) -> ModelConfig:
    """d_model 8; attention with two query heads on one key head, Mamba-2 with four heads in two groups, SwiGLU of width 12."""
    settings = {
        "d_model": 8,
        "pattern": pattern,
        "vocab_multiple": 8,
        "attention": AttentionConfig(n_heads=2, n_kv_heads=1, rope=True, rope_theta=100.0),
        "mamba2": Mamba2Config(d_state=3, head_dim=4, n_groups=2, chunk=5),
        "mlp": MLPConfig(d_ff=12),
    }
    return ModelConfig(**(settings | changes))


def small_model(config: ModelConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> HybridLM:
    """The model with weights that hide nothing: no norm is one, no bias zero, logits far apart."""
    model = build_model(config, VOCAB, device="cpu")
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
            if name.endswith("proj.weight"):
                values *= parameter.shape[1] ** -0.5
            elif "norm" in name:
                values = 1 + 0.3 * values
            elif name.endswith("dt_bias"):
                values -= 1
            parameter.copy_(values)
    return model.to(dtype)


def make_ids(batch: int, time: int, seed: int = 1) -> Tensor:
    return torch.randint(VOCAB, (batch, time), generator=torch.Generator().manual_seed(seed))


def recurrence_logits(model: HybridLM, ids: Tensor) -> Tensor:
    """(B, T, padded V) in float64; padded ids have -inf."""
    parameters = dict(model.named_parameters())
    return language_model(parameters, ids, resolve_layers(model.config), model.config, VOCAB)
