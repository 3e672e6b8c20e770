"""Decoding prepared: the model's forward for one token per row, with a third fewer operators and no module calls.

A token of a small model takes as long as calling its hundreds of small operators takes. ``Decoder`` keeps what depends
on the weights alone and leaves out what only padding, documents, autocast and gradients need; the layers prepare their
own part (``Mixer.prepare``, ``FFN.prepare``). ``HybridLM.forward`` remains the definition that the tests compare with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from hybridlm.layers.cache import LayerCache
from hybridlm.layers.sequence import SequenceInfo
from hybridlm.model.columns import sequence_info
from hybridlm.ops.cross_entropy import cap_logits
from hybridlm.ops.dispatch import autocast_on
from hybridlm.ops.kernels.choice import ALL_TORCH
from hybridlm.ops.linear import linear_of_one
from hybridlm.ops.norm import rms_norm_of_one

if TYPE_CHECKING:
    from hybridlm.model.block import Block
    from hybridlm.model.cache import ModelCache
    from hybridlm.model.lm import HybridLM


class Decoder:
    """Decodes with a model whose weights stay as they are for as long as it is used."""

    def __init__(self, model: HybridLM) -> None:
        self._model = model
        # With several dtypes, as in bfloat16 with its fp32 exceptions, the layers' own code decides what is computed in
        # which.
        dtypes = {parameter.dtype for parameter in model.parameters()}
        self._prepared = len(dtypes) == 1 and dtypes <= {torch.float32, torch.float64}
        if self._prepared:
            with torch.inference_mode():
                self._blocks = [_prepared_block(block) for block in model.blocks]  # type: ignore[arg-type]
                self._head = linear_of_one(model.head_weight)

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, cache: ModelCache) -> Tensor:
        """The logits (B, V) after ``tokens`` (B,), which the cache then holds."""
        model, config = self._model, self._model.config
        if (
            not self._prepared
            or cache.last_doc is not None
            or model.kernels != ALL_TORCH
            or autocast_on(model.embedding.weight)
        ):
            whole: Tensor = model(tokens.unsqueeze(1), cache, keep="last").logits
            return whole[:, -1]
        seq = sequence_info(1, cache, None, None, tokens)
        x = F.embedding(tokens, model.embedding.weight)
        if config.embedding_scale != 1.0:
            x = x * config.embedding_scale
        for block, layer in zip(self._blocks, cache.layers, strict=True):
            x = block(x, layer, seq)
        cache.advance(seq)
        logits = self._head(rms_norm_of_one(x, model.norm.weight, config.norm_eps))[:, : model.vocab_size]
        return cap_logits(logits, config.logit_scale, config.logit_softcap)


def _prepared_block(block: Block) -> Callable[[Tensor, LayerCache, SequenceInfo], Tensor]:
    eps, scale, mixer, mixer_norm = block.eps, block.residual_scale, block.mixer.prepare(), block.mixer_norm.weight
    ffn = None if block.ffn is None else block.ffn.prepare()
    ffn_norm = None if block.ffn_norm is None else block.ffn_norm.weight

    def step(x: Tensor, cache: LayerCache, seq: SequenceInfo) -> Tensor:
        x = torch.add(x, mixer(rms_norm_of_one(x, mixer_norm, eps), cache, seq), alpha=scale)
        if ffn is None or ffn_norm is None:
            return x
        return torch.add(x, ffn(rms_norm_of_one(x, ffn_norm, eps)), alpha=scale)

    return step
