"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), with the parameter names of DeepSeek-V3."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hybridlm.layers.cache import LayerCache, TokenCache
from hybridlm.layers.init import ParamSpec, fused
from hybridlm.layers.layer import PASSES, Phase, linear_flops
from hybridlm.layers.linear import Linear
from hybridlm.layers.mixer import Mixer
from hybridlm.layers.norm import RMSNorm
from hybridlm.layers.sequence import SequenceInfo
from hybridlm.ops.attention import attention
from hybridlm.ops.norm import rms_norm
from hybridlm.ops.rotary import apply_rotary

if TYPE_CHECKING:
    from hybridlm.config.mixers.mla import MLASpec

# DeepSeek's code gives the norms of the two latents an epsilon of their own, whatever that of the model's other norms;
# weights trained or exported under either would differ with any other number.
LATENT_NORM_EPS = 1e-6


class MLA(Mixer):
    """Softmax attention whose keys and values are expanded from one small latent per token, which alone is cached.

    A head's query and key are ``[nope | rope]``: the key's first part comes from the latent, the second is one rotated
    key that all heads share. Rows: kv_a_proj_with_mqa [latent, shared key]; kv_b_proj per head [key, value]; q_proj (or
    q_b_proj) per head [nope, rope].

    There are two equal forms. Expanded: keys and values of every token seen. Absorbed: the latent itself is key and
    value of all heads, the expansion moves to the query and to the weighted sum.
    """

    shares_tables = True

    def __init__(self, spec: MLASpec) -> None:
        super().__init__()
        self.spec = spec
        rows = spec.n_heads * (spec.qk_nope_head_dim + spec.qk_rope_head_dim)
        if spec.q_lora_rank is None:
            self.q_proj = Linear(spec.d_model, rows, bias=False)
        else:
            self.q_a_proj = Linear(spec.d_model, spec.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(spec.q_lora_rank)
            self.q_b_proj = Linear(spec.q_lora_rank, rows, bias=False)
        self.kv_a_proj_with_mqa = Linear(spec.d_model, spec.kv_lora_rank + spec.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(spec.kv_lora_rank)
        self.kv_b_proj = Linear(spec.kv_lora_rank, spec.n_heads * (spec.qk_nope_head_dim + spec.v_head_dim), bias=False)
        self.o_proj = Linear(spec.n_heads * spec.v_head_dim, spec.d_model, bias=False)

    def forward(self, x: Tensor, seq: SequenceInfo, cache: LayerCache | None = None) -> Tensor:
        spec = self.spec
        q = self._queries(x).unflatten(-1, (spec.n_heads, -1))  # (B, T, H, nope + rope)
        q_nope, q_rope = q.split((spec.qk_nope_head_dim, spec.qk_rope_head_dim), dim=-1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((spec.kv_lora_rank, spec.qk_rope_head_dim), dim=-1)
        latent = rms_norm(latent, self.kv_a_layernorm.weight, LATENT_NORM_EPS)  # (B, T, c)
        if spec.rope:
            cos, sin = seq.rotary(spec.qk_rope_head_dim, spec.rope_theta, x.dtype)
            q_rope = apply_rotary(q_rope, cos, sin, interleaved=spec.rope_interleave)
            k_rope = apply_rotary(k_rope.unsqueeze(2), cos, sin, interleaved=spec.rope_interleave).squeeze(
                2
            )  # (B, T, r)
        bounded: int | None = 0  # without a cache the last column is the newest token, as in a bounded one
        if cache is not None:
            assert isinstance(cache, TokenCache)
            seen = cache.append({"c_kv": latent, "k_rope": k_rope}, seq)
            latent, k_rope, bounded = seen["c_kv"], seen["k_rope"], cache.bounded
        mask = None if seq.plain else seq.visible(None, bounded)
        form = self._absorbed if self._absorbing_pays(x.shape[1], latent.shape[1]) else self._expanded
        out: Tensor = self.o_proj(form(q_nope, q_rope, latent, k_rope, mask).flatten(2))
        return out

    def _queries(self, x: Tensor) -> Tensor:
        if self.spec.q_lora_rank is None:
            q: Tensor = self.q_proj(x)
        else:
            q = self.q_b_proj(rms_norm(self.q_a_proj(x), self.q_a_layernorm.weight, LATENT_NORM_EPS))
        return q

    def _absorbing_pays(self, queries: int, keys: int) -> bool:
        """Whether the absorbed form needs fewer products: for a token decoded after any past, and for a few tokens
        after a long one.

        Where there is no past the answer is no, whatever the widths, so that training has one form only. Per head, the
        forms need ``S c (nope + v) + T S (nope + rope + v)`` and ``T c (nope + v) + T S (2 c + rope)`` multiply-adds
        for T queries on S keys.
        """
        spec = self.spec
        expansion = spec.kv_lora_rank * (spec.qk_nope_head_dim + spec.v_head_dim)
        longer = 2 * spec.kv_lora_rank - spec.qk_nope_head_dim - spec.v_head_dim
        return queries < keys and queries * keys * longer < (keys - queries) * expansion

    def _expanded(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T, H, v) from queries (B, T, H, ...), latents (B, S, c) and shared keys (B, S, r)."""
        spec = self.spec
        kv = self.kv_b_proj(latent).unflatten(-1, (spec.n_heads, -1))  # (B, S, H, nope + v)
        k_nope, v = kv.split((spec.qk_nope_head_dim, spec.v_head_dim), dim=-1)
        shared = k_rope.unsqueeze(2).expand(-1, -1, spec.n_heads, -1)
        return attention(
            torch.cat((q_nope, q_rope), -1), torch.cat((k_nope, shared), -1), v, scale=spec.scale, mask=mask
        )

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, mask: Tensor | None) -> Tensor:
        """The same, with one head of keys ``[latent | shared key]`` for all queries; its values are the latents."""
        spec = self.spec
        weight = self.kv_b_proj.weight.to(latent.dtype).unflatten(0, (spec.n_heads, -1))
        to_key, to_value = weight.split((spec.qk_nope_head_dim, spec.v_head_dim), dim=1)  # (H, nope, c), (H, v, c)
        q = torch.cat((torch.einsum("bthn,hnc->bthc", q_nope, to_key), q_rope), -1)
        k = torch.cat((latent, k_rope), -1).unsqueeze(2)  # (B, S, 1, c + r)
        mixed = attention(q, k, k, scale=spec.scale, mask=mask)[
            ..., : spec.kv_lora_rank
        ]  # values as wide as keys: fused kernels ask for it
        return torch.einsum("bthc,hvc->bthv", mixed, to_value)

    def new_cache(self, batch: int, max_len: int, *, dtype: torch.dtype, device: torch.device) -> TokenCache:
        one: dict[str, tuple[int, ...]] = {
            "c_kv": (self.spec.kv_lora_rank,),
            "k_rope": (self.spec.qk_rope_head_dim,),
        }  # after the norm, after the rotation
        return TokenCache(one, batch, max_len, None, dtype=dtype, device=device)

    def flops(self, context: int, phase: Phase) -> float:
        """In decode those of the absorbed form, in which the expansion costs as much, but for the new token alone."""
        spec = self.spec
        projections = linear_flops(*(layer for layer in self.modules() if isinstance(layer, nn.Linear)))
        if phase == "decode":
            keys, per_key = context + 1.0, 2 * spec.kv_lora_rank + spec.qk_rope_head_dim
        else:
            keys, per_key = (context + 1) / 2, spec.qk_nope_head_dim + spec.qk_rope_head_dim + spec.v_head_dim
        return PASSES[phase] * (projections + 2 * spec.n_heads * per_key * keys)

    def param_specs(self) -> dict[str, ParamSpec]:
        spec = self.spec
        specs = super().param_specs()
        if spec.qk_rope_head_dim:
            specs["kv_a_proj_with_mqa.weight"] = fused(spec.kv_lora_rank, spec.qk_rope_head_dim)
        # Keys and values are different maps of the latent; their rows alternate head by head, so each head's are blocks
        # of their own.
        specs["kv_b_proj.weight"] = fused(*(spec.qk_nope_head_dim, spec.v_head_dim) * spec.n_heads)
        return specs
