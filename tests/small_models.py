"""Models of a few thousand parameters for the tests of the whole model."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import pytest
import torch
from recurrences import document_by_document, language_model
from torch import Tensor

from hybridlm.config.ffns.mlp import MLPConfig
from hybridlm.config.ffns.moe import MoEConfig
from hybridlm.config.mixers.attention import AttentionConfig
from hybridlm.config.mixers.mamba1 import Mamba1Config
from hybridlm.config.mixers.mamba2 import Mamba2Config
from hybridlm.config.mixers.mamba3 import Mamba3Config
from hybridlm.config.mixers.mla import MLAConfig
from hybridlm.config.model import ModelConfig
from hybridlm.model.build import build_model
from hybridlm.model.cache import ModelCache
from hybridlm.model.lm import HybridLM

VOCAB = 13  # padded to 16


def small_config(pattern: str = "MTM", **changes) -> ModelConfig:
    """d_model 8; attention with two query heads on one key head, Mamba-2 with four heads in two groups, SwiGLU of width
    12.

    Letters beside the usual ones: W, attention that sees three tokens; N, attention without positions; X, Mamba-3 with
    two ranks.
    """
    settings = {
        "d_model": 8,
        "pattern": pattern,
        "vocab_multiple": 8,
        "attention": AttentionConfig(n_heads=2, n_kv_heads=1, rope=True, rope_theta=100.0),
        "mamba2": Mamba2Config(d_state=3, head_dim=4, n_groups=2, chunk=5),
        "mamba1": Mamba1Config(d_state=3, dt_rank=2, chunk=5),
        "mamba3": Mamba3Config(d_state=4, head_dim=4, n_groups=2, chunk=5),
        "mla": MLAConfig(
            n_heads=2,
            kv_lora_rank=5,
            q_lora_rank=3,
            qk_nope_head_dim=3,
            qk_rope_head_dim=4,
            v_head_dim=6,
            rope_theta=100.0,
        ),
        "mlp": MLPConfig(d_ff=12),
        "moe": MoEConfig(n_experts=4, top_k=2, d_expert=6, n_shared_experts=1),
        "variants": {
            "W": {"mixer": "attention", "window": 3},
            "N": {"mixer": "attention", "rope": False},
            "X": {"mixer": "mamba3", "mimo_rank": 2},
        },
    }
    return ModelConfig(**(settings | changes))


def small_model(config: ModelConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> HybridLM:
    """The model with weights that hide nothing: no norm is one, no bias zero, logits far apart."""
    model = build_model(config, VOCAB, device="cpu")
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
            if "proj" in name and parameter.dim() > 1:
                values *= parameter.shape[-1] ** -0.5
            elif "norm" in name:
                values = 1 + 0.3 * values
            elif name.endswith(("dt_bias", "dt_proj.bias")):
                values -= 1
            parameter.copy_(values)
        for buffer in model.buffers():
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=g))
    return model.to(dtype)


def make_ids(batch: int, time: int, seed: int = 1) -> Tensor:
    return torch.randint(VOCAB, (batch, time), generator=torch.Generator().manual_seed(seed))


def recurrence_logits(model: HybridLM, ids: Tensor) -> Tensor:
    """(B, T, padded V) in float64; padded ids have -inf."""
    parameters = dict(model.named_parameters())
    return language_model(parameters, ids, model.config.layers, model.config, VOCAB)


# What the tests of documents, padding and caches share. Layouts of 17 columns: Mamba chunks hold 5 tokens.
PATTERNS = ["TT", "WNW", "LL", "TWL", "M1 M1", "M2 M2", "M3 M3", "XX", "M1 T:moe M2 L", "L M3 W X:moe"]
every_pattern = pytest.mark.parametrize("pattern", PATTERNS)
TIME = 17
DOCUMENTS = torch.tensor(
    [
        [i for i, length in enumerate(row) for _ in range(length)]
        for row in ([17], [1] * 17, [3, 1, 1, 5, 7], [5, 5, 7], [16, 1])
    ]
)


def alone_recorded(model: HybridLM, ids: Tensor, doc_ids: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
    """(B, T, V) logits where every row, without its padding, and every document of it ran by itself; zero at
    padding."""
    valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
    doc_ids = torch.zeros_like(ids) if doc_ids is None else doc_ids
    rows = []
    for row, documents, kept in zip(ids, doc_ids, valid, strict=True):
        logits = model.embedding.weight.new_zeros(len(row), model.vocab_size)
        if bool(kept.any()):
            want = document_by_document(lambda document: model(document).logits, row[None, kept], documents[None, kept])
            logits = logits.masked_scatter(kept[:, None], want[0])
        rows.append(logits)
    return torch.stack(rows)


alone = torch.no_grad()(alone_recorded)  # half the time


def fed(
    model: HybridLM,
    ids: Tensor,
    cache: ModelCache,
    cuts: Iterable[int] = (),
    doc_ids: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Logits of ids given to the cache in pieces that begin at the columns ``cuts``; zero at padding, where they are
    only finite."""
    pieces = []
    for start, end in pairwise([0, *sorted(cuts), ids.shape[1]]):
        with torch.no_grad():
            given = [None if tensor is None else tensor[:, start:end] for tensor in (doc_ids, valid)]
            logits = model(ids[:, start:end], cache, doc_ids=given[0], valid=given[1]).logits
        assert bool(logits.isfinite().all())
        pieces.append(logits if given[1] is None else logits.masked_fill(~given[1][..., None], 0.0))
    return torch.cat(pieces, 1)


def loss_and_gradients(model: HybridLM, loss: Tensor) -> dict[str, Tensor]:
    """The loss, and its gradient by the name of every parameter."""
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, list(parameters.values()))
    return {"loss": loss.detach()} | dict(zip(parameters, grads, strict=True))
