"""Decoding prepared: the same model, one token of every row at a time, with a third fewer operators and none of the
modules' calls.

At this size a token takes as long as its hundreds of small operators take to be called. ``Decoder`` holds what hangs on
the weights alone (decays, taps, views) and leaves out what only padding, documents, autocast and gradients need.
Attention, Mamba-2 and the dense FFN have a form of their own here; every other layer is called as it is.
``HybridLM.forward`` stays the definition, which the tests compare.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from hybridlm.layers.attention import Attention
from hybridlm.layers.cache import LayerCache
from hybridlm.layers.mamba2 import Mamba2
from hybridlm.layers.mlp import MLP
from hybridlm.layers.sequence import SequenceInfo
from hybridlm.model.block import Block
from hybridlm.model.decode.attention import AttentionToken
from hybridlm.model.decode.mamba2 import Mamba2Token
from hybridlm.model.decode.projection import Projection, normed
from hybridlm.ops.cross_entropy import cap_logits
from hybridlm.ops.dispatch import autocast_on
from hybridlm.ops.kernels.choice import ALL_TORCH

if TYPE_CHECKING:
    from hybridlm.layers.ffn import FFN
    from hybridlm.layers.mixer import Mixer
    from hybridlm.model.cache import ModelCache
    from hybridlm.model.lm import HybridLM

MixerToken = Callable[[Tensor, LayerCache, SequenceInfo], Tensor]
FFNToken = Callable[[Tensor], Tensor]


class Decoder:
    """Made of a model whose weights stay as they are as long as it is used."""

    def __init__(self, model: HybridLM) -> None:
        self._model = model
        # Where the dtypes differ, as in bfloat16 with its fp32 exceptions, a layer's own code knows what is computed in
        # which.
        dtypes = {parameter.dtype for parameter in model.parameters()}
        self._prepared = len(dtypes) == 1 and dtypes <= {torch.float32, torch.float64}
        if self._prepared:
            with torch.inference_mode():
                self._blocks = [_BlockToken(block) for block in model.blocks]  # type: ignore[arg-type]
                self._head = Projection(model.head_weight)

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, cache: ModelCache) -> Tensor:
        """The logits (B, V) behind ``tokens`` (B,), which the cache then holds."""
        model = self._model
        told_apart = cache.ragged or cache.last_doc is not None
        # A backend that was chosen is the layers' own matter too.
        if not self._prepared or told_apart or model.kernels != ALL_TORCH or autocast_on(model.embedding.weight):
            whole: Tensor = model(tokens.unsqueeze(1), cache, keep="last").logits
            return whole[:, -1]
        config = model.config
        seq = SequenceInfo.contiguous(len(tokens), 1, cache.past, tokens.device)
        x = F.embedding(tokens, model.embedding.weight)
        if config.embedding_scale != 1.0:
            x = x * config.embedding_scale
        for block, layer in zip(self._blocks, cache.layers, strict=True):
            x = block(x, layer, seq)
        cache.advance(seq)
        logits = self._head(normed(x, model.norm.weight, config.norm_eps))[:, : model.vocab_size]
        return cap_logits(logits, config.logit_scale, config.logit_softcap)


class _BlockToken:
    """A block, for one token."""

    def __init__(self, block: Block) -> None:
        self.eps, self.scale = block.eps, block.residual_scale
        self.mixer, self.mixer_norm = _mixer_token(block.mixer), block.mixer_norm.weight
        self.ffn = None if block.ffn is None else _ffn_token(block.ffn)
        self.ffn_norm = None if block.ffn_norm is None else block.ffn_norm.weight

    def __call__(self, x: Tensor, cache: LayerCache, seq: SequenceInfo) -> Tensor:
        """(B, D) to (B, D)."""
        x = torch.add(x, self.mixer(normed(x, self.mixer_norm, self.eps), cache, seq), alpha=self.scale)
        if self.ffn is None or self.ffn_norm is None:
            return x
        return torch.add(x, self.ffn(normed(x, self.ffn_norm, self.eps)), alpha=self.scale)


def _mixer_token(mixer: Mixer) -> MixerToken:
    if isinstance(mixer, Mamba2):
        return Mamba2Token(mixer)
    if isinstance(mixer, Attention):
        return AttentionToken(mixer)

    def as_it_is(x: Tensor, cache: LayerCache, seq: SequenceInfo) -> Tensor:
        y: Tensor = mixer(x.unsqueeze(1), seq, cache)
        return y.squeeze(1)

    return as_it_is


def _ffn_token(ffn: FFN) -> FFNToken:
    if not isinstance(ffn, MLP):
        return lambda x: ffn(x.unsqueeze(1))[0].squeeze(1)
    gate = None if ffn.gate_proj is None else Projection(ffn.gate_proj.weight)
    up, down = Projection(ffn.up_proj.weight), Projection(ffn.down_proj.weight)

    def dense(x: Tensor) -> Tensor:
        if gate is None:
            return down(up(x).relu_().square_())
        return down(F.silu(gate(x), inplace=True).mul_(up(x)))

    return dense
