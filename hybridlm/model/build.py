"""From a configuration to a built model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hybridlm.config.resolve import resolve_layers
from hybridlm.layers.init import Init
from hybridlm.layers.layer import layer_class
from hybridlm.model.block import Block
from hybridlm.model.lm import HybridLM

if TYPE_CHECKING:
    from hybridlm.config.layers import LayerSpec
    from hybridlm.config.model import ModelConfig
    from hybridlm.layers.ffn import FFN
    from hybridlm.layers.mixer import Mixer


def build_block(spec: LayerSpec, config: ModelConfig) -> Block:
    """One layer of the model."""
    mixer: Mixer = layer_class(spec.params)(spec.params)
    ffn: FFN | None = None if spec.ffn is None else layer_class(spec.ffn)(spec.ffn)
    return Block(mixer, ffn, config.d_model, eps=config.norm_eps, residual_scale=config.residual_scale)


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
