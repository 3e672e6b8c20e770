"""References the tests compare against: every layer token by token in float64, from its equations and with no code of
the package.

They are loops on purpose. Nothing is chunked, fused, padded or shared with ``hybridlm.ops``; autograd differentiates
them. None of them knows documents: each document is run by itself (``document_by_document``). ``p`` maps a parameter's
name to its tensor, as ``dict(module.named_parameters())`` does. Shape letters: B batch, T time, D d_model, H heads, P
head_dim, N d_state, G groups, E experts, V vocabulary, K conv width, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from formulas import (
    Params,
    assert_near,
    below,
    causal_conv,
    group_rms_norm,
    relative_error,
    rms_norm,
    sigmoid,
    silu,
    softplus,
)
from recurrences_attention import attend, attention, mla, rotate
from recurrences_delta import gdn, kda
from recurrences_ffn import Routing, mlp, moe
from recurrences_mamba import Mamba1States, Mamba2States, Mamba3States, mamba1, mamba2, mamba3, ssd
from torch import Tensor

from hybridlm.config.ffns.mlp import MLPSpec
from hybridlm.config.layers import LayerSpec, Spec
from hybridlm.config.mixers.attention import AttentionSpec
from hybridlm.config.mixers.gdn import GDNSpec
from hybridlm.config.mixers.kda import KDASpec
from hybridlm.config.mixers.mamba1 import Mamba1Spec
from hybridlm.config.mixers.mamba2 import Mamba2Spec
from hybridlm.config.mixers.mamba3 import Mamba3Spec
from hybridlm.config.mixers.mla import MLASpec
from hybridlm.config.model import ModelConfig

__all__ = [
    "Mamba1States",
    "Mamba2States",
    "Mamba3States",
    "Params",
    "Routing",
    "assert_near",
    "attend",
    "attention",
    "below",
    "causal_conv",
    "cross_entropy",
    "document_by_document",
    "group_rms_norm",
    "language_model",
    "mamba1",
    "mamba2",
    "mamba3",
    "mixer",
    "mla",
    "mlp",
    "moe",
    "relative_error",
    "rms_norm",
    "rotate",
    "scaled_logits",
    "sigmoid",
    "silu",
    "softplus",
    "ssd",
]

MIXERS: dict[type, Callable[..., tuple]] = {
    AttentionSpec: attention,
    Mamba1Spec: mamba1,
    Mamba2Spec: mamba2,
    Mamba3Spec: mamba3,
    MLASpec: mla,
    GDNSpec: gdn,
    KDASpec: kda,
}


def mixer(p: Params, u: Tensor, spec: Spec) -> Tensor:
    """The mixer of any kind on u (B,T,D), from the start of a document."""
    y: Tensor = MIXERS[type(spec)](p, u, spec)[0]
    return y


def document_by_document(layer: Callable[[Tensor], Tensor], x: Tensor, doc_ids: Tensor) -> Tensor:
    """``layer`` on every document of x (B,T,...) by itself, joined as they stood; doc_ids (B,T), a new document
    wherever it changes."""
    rows = []
    for row, ids in zip(x.split(1), doc_ids.tolist(), strict=True):
        lengths = [len(list(run)) for _, run in groupby(ids)]
        rows.append(torch.cat([layer(document) for document in row.split(lengths, dim=1)], dim=1))
    return torch.cat(rows)


def scaled_logits(
    hidden: Tensor, head: Tensor, vocab_size: int, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """Logits (..., V_padded): scaled, then capped, then -inf for the ids past ``vocab_size``."""
    logits = scale * (hidden @ head.T)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    padding = torch.arange(head.shape[0]) >= vocab_size
    return logits.masked_fill(padding, -math.inf)


def cross_entropy(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    vocab_size: int,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore: int = -100,
) -> tuple[Tensor, int]:
    """Sum of -log p(target) over the targets that are not ``ignore``, row by row; hidden (R,D), targets (R). Returns it
    and their count."""
    total, count = hidden.sum() * 0, 0
    for row, target in zip(hidden, targets.tolist(), strict=True):
        if target == ignore:
            continue
        logits = scaled_logits(row, head, vocab_size, scale, softcap)[:vocab_size]
        total = (
            total + torch.log(torch.exp(logits - logits.max().detach()).sum()) + logits.max().detach() - logits[target]
        )
        count += 1
    return total, count


def language_model(p: Params, ids: Tensor, layers: Sequence[LayerSpec], model: ModelConfig, vocab_size: int) -> Tensor:
    """Logits (B,T,V_padded) of a whole model on ids (B,T): embedding, pre-norm blocks, final norm, head, with every
    multiplier."""
    eps, add = model.norm_eps, model.residual_scale
    x = model.embedding_scale * p["embedding.weight"][ids]
    for index, layer in enumerate(layers):
        inner = below(p, f"blocks.{index}.")
        x = x + add * mixer(below(inner, "mixer."), rms_norm(x, inner["mixer_norm.weight"], eps), layer.params)
        if layer.ffn is not None:
            normed, ffn = rms_norm(x, inner["ffn_norm.weight"], eps), below(inner, "ffn.")
            x = x + add * (
                mlp(ffn, normed, layer.ffn) if isinstance(layer.ffn, MLPSpec) else moe(ffn, normed, layer.ffn)[0]
            )
    head = p["embedding.weight"] if model.tie_embeddings else p["lm_head.weight"]
    return scaled_logits(rms_norm(x, p["norm.weight"], eps), head, vocab_size, model.logit_scale, model.logit_softcap)
