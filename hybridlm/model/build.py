"""From a configuration to a built model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from hybridlm.config.resolve import resolve_layers
from hybridlm.layers.attention import Attention
from hybridlm.layers.ffn import FFN
from hybridlm.layers.init import Init
from hybridlm.layers.mamba1 import Mamba1
from hybridlm.layers.mamba2 import Mamba2
from hybridlm.layers.mamba3 import Mamba3
from hybridlm.layers.mixer import Mixer
from hybridlm.layers.mla import MLA
from hybridlm.layers.mlp import MLP
from hybridlm.layers.moe import MoE
from hybridlm.model.block import Block
from hybridlm.model.lm import HybridLM

if TYPE_CHECKING:
    from hybridlm.config.layers import LayerSpec
    from hybridlm.config.model import ModelConfig

# The two registries: a new kind of layer is one line here and one section in config/.
MIXERS: dict[str, Callable[[Any], Mixer]] = {
    "attention": Attention,
    "mla": MLA,
    "mamba1": Mamba1,
    "mamba2": Mamba2,
    "mamba3": Mamba3,
}
FFNS: dict[str, Callable[[Any], FFN]] = {"mlp": MLP, "moe": MoE}


def build_block(spec: LayerSpec, config: ModelConfig) -> Block:
    """One layer of the model."""
    ffn = None if spec.ffn is None else FFNS[spec.ffn_kind](spec.ffn)
    return Block(
        MIXERS[spec.kind](spec.params), ffn, config.d_model, eps=config.norm_eps, residual_scale=config.residual_scale
    )


def build_model(config: ModelConfig, vocab_size: int, *, device: str | torch.device = "meta") -> HybridLM:
    """The model of ``config``, its weights not yet drawn (on "meta": not even allocated).

    vocab_size: ids of the tokenizer; a smaller ``config.vocab_size`` raises ValueError.
    """
    vocab = config.vocab_size or vocab_size
    if vocab < vocab_size:
        raise ValueError(f"model.vocab_size = {vocab}: smaller than the tokenizer's {vocab_size}")
    specs = resolve_layers(config)
    init = Init(std=config.init.std, residual=config.init.residual, n_layers=len(specs))
    with torch.device(device):
        return HybridLM(config, [build_block(spec, config) for spec in specs], vocab, init)


def fresh_model(config: ModelConfig, vocab_size: int, *, seed: int, device: str | torch.device) -> HybridLM:
    """The model with freshly drawn weights. ``device`` is where they are drawn: a seed means the same weights on one
    kind of device only, so training draws on the CPU and moves the model afterwards."""
    model = build_model(config, vocab_size).to_empty(device=device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.reset_parameters()
    return model
