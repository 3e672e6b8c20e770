"""One token through attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from hybridlm.layers.cache import LayerCache, TokenCache
from hybridlm.model.decode.projection import Projection, normed

if TYPE_CHECKING:
    from hybridlm.layers.attention import Attention
    from hybridlm.layers.sequence import SequenceInfo


class AttentionToken:
    """What ``Attention.forward`` gives for one token after others whose keys all rows hold in the same columns."""

    def __init__(self, mixer: Attention) -> None:
        self.spec, self._mixer = mixer.spec, mixer
        self.q_proj, self.k_proj, self.v_proj = (
            Projection(layer.weight) for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
        )
        self.o_proj = Projection(mixer.o_proj.weight)
        self.norm = None
        if (
            mixer.q_norm is not None and mixer.k_norm is not None
        ):  # (H + H_kv, P): the heads of both are one tensor here
            heads = (
                mixer.q_norm.weight.expand(self.spec.n_heads, -1),
                mixer.k_norm.weight.expand(self.spec.n_kv_heads, -1),
            )
            self.norm = torch.cat(heads)

    def __call__(self, x: Tensor, cache: LayerCache, seq: SequenceInfo) -> Tensor:
        """(B, D), normalised, to (B, D); the cache is brought up to date."""
        assert isinstance(cache, TokenCache)
        if cache.bounded is not None:
            out: Tensor = self._mixer(x.unsqueeze(1), seq, cache)
            return out.squeeze(1)
        spec, rows = self.spec, x.shape[0]
        qk = torch.cat((self.q_proj(x), self.k_proj(x)), 1).view(rows, -1, spec.head_dim)  # (B, H + H_kv, P)
        if self.norm is not None:
            qk = normed(qk, self.norm, spec.norm_eps)
        if spec.rope:
            cos, sin = seq.token_rotary(spec.head_dim, spec.rope_theta, x.dtype)
            qk = (qk * cos).addcmul_(qk.roll(spec.head_dim // 2, -1), sin)
        q, k = qk.split_with_sizes((spec.n_heads, spec.n_kv_heads), 1)
        keys, values = cache.place_token(k, self.v_proj(x).view(rows, spec.n_kv_heads, spec.head_dim), seq.past)
        q = q.reshape(rows, spec.n_kv_heads, -1, spec.head_dim)  # the heads of a group are queries of one head
        y = F.scaled_dot_product_attention(q, keys, values, scale=spec.scale)
        return self.o_proj(y.reshape(rows, -1))
