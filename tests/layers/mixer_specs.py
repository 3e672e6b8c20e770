"""The mixers under test: every option of each kind at least once, as small as still tells them apart."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import torch
from recurrences import attention, mamba2
from torch import Tensor

from hybridlm.config.layers import AttentionSpec, Mamba2Spec
from hybridlm.layers.attention import Attention
from hybridlm.layers.mamba2 import Mamba2
from hybridlm.layers.mixer import Mixer
from hybridlm.layers.sequence import SequenceInfo

CPU = torch.device("cpu")
ATTENTION = AttentionSpec(
    d_model=8, n_heads=2, n_kv_heads=2, head_dim=4, rope=False, rope_theta=100.0, qk_norm=False, window=None, scale=0.4, norm_eps=1e-5
)
GQA = replace(ATTENTION, n_heads=4, n_kv_heads=2, head_dim=6)  # n_heads * head_dim is not d_model
MAMBA2 = Mamba2Spec(
    d_model=8,
    n_heads=4,
    head_dim=4,
    d_state=3,
    n_groups=1,
    d_conv=4,
    chunk=8,
    dt_range=(1e-3, 1e-1),
    dt_limit=(0.0, math.inf),
    a_range=(1.0, 16.0),
    norm_before_gate=False,
    norm_eps=1e-5,
)
SPECS: dict[str, AttentionSpec | Mamba2Spec] = {
    "attention": ATTENTION,
    "attention_gqa": GQA,
    "attention_rope": replace(GQA, rope=True),
    "attention_qk_norm": replace(GQA, rope=True, qk_norm=True),
    "attention_window": replace(GQA, rope=True, window=3),
    "attention_window_longer_than_the_text": replace(ATTENTION, window=100),
    "attention_window_of_one": replace(ATTENTION, window=1),
    "mamba2": MAMBA2,
    "mamba2_groups": replace(MAMBA2, n_groups=2),
    "mamba2_dt_limit": replace(MAMBA2, dt_limit=(0.1, 0.6)),
    "mamba2_norm_before_gate": replace(MAMBA2, n_groups=2, norm_before_gate=True),
    "mamba2_chunk_of_five": replace(MAMBA2, chunk=5, d_conv=2),
}


def make_mixer(spec: AttentionSpec | Mamba2Spec, dtype: torch.dtype = torch.float64, seed: int = 0) -> Mixer:
    """The layer with weights that hide nothing: no norm is one, no bias zero, no head like another."""
    mixer = Attention(spec) if isinstance(spec, AttentionSpec) else Mamba2(spec)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            values = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
            if name.endswith("proj.weight"):
                values *= parameter.shape[1] ** -0.5
            elif "norm" in name:
                values = 1 + 0.3 * values
            elif name == "dt_bias":
                values -= 1
            parameter.copy_(values)
    return mixer.to(dtype)


def make_input(batch: int, time: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(batch, time, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def forward(mixer: Mixer, x: Tensor) -> Tensor:
    return mixer(x, SequenceInfo.contiguous(x.shape[0], x.shape[1], 0, CPU))


def forward_in_pieces(mixer: Mixer, x: Tensor, cuts: list[int], max_len: int, cache_dtype: torch.dtype | None = None):
    """Output and final cache where the text is cut in front of the tokens ``cuts``."""
    cache = mixer.new_cache(x.shape[0], max_len, dtype=cache_dtype or x.dtype, device=CPU)
    outputs = []
    bounds = [0, *cuts, x.shape[1]]
    with torch.no_grad():
        for start, end in pairwise(bounds):
            outputs.append(mixer(x[:, start:end], SequenceInfo.contiguous(x.shape[0], end - start, start, CPU), cache))
    return torch.cat(outputs, 1), cache


def recurrence(spec: AttentionSpec | Mamba2Spec, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    return (attention if isinstance(spec, AttentionSpec) else mamba2)(parameters, x, spec)[0]
