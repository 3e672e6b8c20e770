"""The mixers under test: every option of each kind at least once, as small as still tells them apart."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from recurrences import assert_near
from recurrences import mixer as recurrence_of
from torch import Tensor

from hybridlm.config.layers import Spec
from hybridlm.config.mixers.attention import AttentionSpec
from hybridlm.config.mixers.gdn import GDNSpec
from hybridlm.config.mixers.kda import KDASpec
from hybridlm.config.mixers.mamba1 import Mamba1Spec
from hybridlm.config.mixers.mamba2 import Mamba2Spec
from hybridlm.config.mixers.mamba3 import Mamba3Spec
from hybridlm.config.mixers.mla import MLASpec
from hybridlm.layers.cache import LayerCache
from hybridlm.layers.layer import layer_class
from hybridlm.layers.mixer import Mixer
from hybridlm.layers.sequence import SequenceInfo

CPU = torch.device("cpu")
DT_RANGE = (1e-3, 1e-1)
ATTENTION = AttentionSpec(
    d_model=8,
    n_heads=2,
    n_kv_heads=2,
    head_dim=4,
    rope=False,
    rope_theta=100.0,
    rope_dim=4,
    qk_norm=False,
    window=None,
    scale=0.4,
    gate=False,
    norm_eps=1e-5,
)
GQA = replace(ATTENTION, n_heads=4, n_kv_heads=2, head_dim=6, rope_dim=6)  # n_heads * head_dim is not d_model
MAMBA1 = Mamba1Spec(d_model=8, d_inner=16, d_state=3, d_conv=4, dt_rank=1, bias=False, chunk=8, dt_range=DT_RANGE)
MAMBA2 = Mamba2Spec(
    d_model=8,
    n_heads=4,
    head_dim=4,
    d_state=3,
    n_groups=1,
    d_conv=4,
    chunk=8,
    dt_range=DT_RANGE,
    dt_limit=(0.0, math.inf),
    a_range=(1.0, 16.0),
    norm_before_gate=False,
    norm_eps=1e-5,
)
MAMBA3 = Mamba3Spec(
    d_model=8,
    n_heads=4,
    head_dim=4,
    d_state=6,
    n_groups=1,
    mimo_rank=None,
    chunk=8,
    complex_rope=True,
    rope_fraction=0.5,
    trapezoidal=True,
    use_conv=False,
    d_conv=4,
    a_activation="softplus",
    a_floor=1e-4,
    outproj_norm=False,
    dt_range=DT_RANGE,
    norm_eps=1e-5,
)
MIMO = replace(MAMBA3, mimo_rank=2)
MLA = MLASpec(
    d_model=8,
    n_heads=2,
    kv_lora_rank=5,
    q_lora_rank=None,
    qk_nope_head_dim=3,
    qk_rope_head_dim=4,
    v_head_dim=6,
    rope=True,
    rope_theta=100.0,
    rope_interleave=True,
    scale=0.4,
)
DELTA: dict[str, Any] = {
    "d_model": 8,
    "n_k_heads": 2,
    "n_v_heads": 2,
    "head_k_dim": 4,
    "head_v_dim": 6,
    "use_conv": True,
    "d_conv": 4,
    "allow_neg_eigval": False,
    "chunk": 8,
    "dt_range": DT_RANGE,
    "a_range": (1.0, 16.0),
    "norm_eps": 1e-5,
}
GDN = GDNSpec(**DELTA, use_gate=True)
KDA = KDASpec(**DELTA, gate_bias=False, lower_bound=None)
SPECS: dict[str, Spec] = {
    "attention": ATTENTION,
    "attention_gqa": GQA,
    "attention_rope": replace(GQA, rope=True),
    "attention_part_of_a_head_rotated": replace(GQA, rope=True, rope_dim=4),
    "attention_gate": replace(GQA, rope=True, gate=True),
    "attention_qk_norm": replace(GQA, rope=True, qk_norm=True),
    "attention_window": replace(GQA, rope=True, window=3),
    "attention_window_longer_than_the_text": replace(ATTENTION, window=100),
    "attention_window_of_one": replace(ATTENTION, window=1),
    "mamba1": MAMBA1,
    "mamba1_bias": replace(MAMBA1, bias=True, dt_rank=3),
    "mamba1_chunk_of_five": replace(MAMBA1, chunk=5, d_conv=2),
    "mamba1_convolution_of_one": replace(MAMBA1, d_conv=1, d_state=1, chunk=1),
    "mamba2": MAMBA2,
    "mamba2_groups": replace(MAMBA2, n_groups=2),
    "mamba2_dt_limit": replace(MAMBA2, dt_limit=(0.1, 0.6)),
    "mamba2_norm_before_gate": replace(MAMBA2, n_groups=2, norm_before_gate=True),
    "mamba2_chunk_of_five": replace(MAMBA2, chunk=5, d_conv=2),
    "mamba2_convolution_of_one": replace(MAMBA2, d_conv=1, d_state=1, chunk=1),
    "mamba3": MAMBA3,
    "mamba3_full_rope": replace(MAMBA3, rope_fraction=1.0, a_activation="heavy_tail"),
    "mamba3_odd_state": replace(MAMBA3, d_state=5, rope_fraction=1.0, chunk=1),
    "mamba3_no_rope": replace(MAMBA3, complex_rope=False),
    "mamba3_euler": replace(MAMBA3, trapezoidal=False),
    "mamba3_neither": replace(MAMBA3, complex_rope=False, trapezoidal=False, d_state=2),
    "mamba3_conv": replace(MAMBA3, use_conv=True, n_groups=2),
    "mamba3_conv_euler": replace(MAMBA3, use_conv=True, d_conv=2, trapezoidal=False),
    "mamba3_floor": replace(MAMBA3, a_floor=0.6, chunk=5),
    "mamba3_floor_heavy_tail": replace(MAMBA3, a_floor=0.6, a_activation="heavy_tail", complex_rope=False),
    "mamba3_outproj_norm": replace(MAMBA3, outproj_norm=True),
    "mamba3_groups": replace(MAMBA3, n_groups=2, chunk=5),
    "mamba3_mimo": MIMO,
    "mamba3_mimo_of_rank_one": replace(MIMO, mimo_rank=1, rope_fraction=1.0),
    "mamba3_mimo_groups": replace(MIMO, n_groups=2, rope_fraction=1.0, chunk=5),
    "mamba3_mimo_conv_norm": replace(
        MIMO, mimo_rank=3, d_state=4, use_conv=True, outproj_norm=True, a_activation="heavy_tail"
    ),
    "mamba3_mimo_neither": replace(MIMO, complex_rope=False, trapezoidal=False, n_groups=4, d_state=3),
    "mla": MLA,
    "mla_q_lora": replace(MLA, q_lora_rank=3),
    "mla_half_split": replace(MLA, rope_interleave=False, n_heads=1),
    "mla_unrotated": replace(MLA, rope=False),
    "mla_no_shared_key": replace(MLA, rope=False, qk_rope_head_dim=0),
    "gdn": GDN,
    "gdn_grouped": replace(GDN, n_v_heads=4, head_k_dim=5, head_v_dim=8, chunk=4, d_conv=2),
    "gdn_neg_eigval": replace(GDN, allow_neg_eigval=True, n_k_heads=1),
    "gdn_no_conv": replace(GDN, use_conv=False),
    "gdn_no_gate": replace(GDN, use_gate=False, d_conv=1, chunk=1),
    "kda": KDA,
    "kda_grouped_bias": replace(KDA, n_v_heads=4, head_k_dim=5, head_v_dim=8, chunk=4, gate_bias=True),
    "kda_neg_eigval": replace(KDA, allow_neg_eigval=True, n_k_heads=1, d_conv=2),
    "kda_lower_bound": replace(KDA, lower_bound=-5.0, use_conv=False),
}


every_mixer = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def layer_of(spec: Spec) -> Mixer:
    """The layer as it is built, its weights not yet drawn."""
    mixer: Mixer = layer_class(spec)(spec)
    return mixer


def make_mixer(spec: Spec, dtype: torch.dtype = torch.float64, seed: int = 0) -> Mixer:
    """The layer with weights that hide nothing: no norm is one, no bias zero, no head or rank like another."""
    mixer = layer_of(spec)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            values = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
            if "proj" in name and name.endswith("weight"):
                values *= parameter.shape[1] ** -0.5
            elif "norm" in name:
                values = 1 + 0.3 * values
            elif name in ("dt_bias", "dt_proj.bias"):
                values -= 1
            parameter.copy_(values)
    return mixer.to(dtype)


def make_input(batch: int, time: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(batch, time, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def forward(mixer: Mixer, x: Tensor) -> Tensor:
    return mixer(x, SequenceInfo.contiguous(x.shape[0], x.shape[1], 0, CPU))


def forward_in_pieces(
    mixer: Mixer, x: Tensor, cuts: list[int], max_len: int, cache_dtype: torch.dtype | None = None
) -> tuple[Tensor, LayerCache]:
    """Output and final cache where the text is cut in front of the tokens ``cuts``."""
    cache = mixer.new_cache(x.shape[0], max_len, dtype=cache_dtype or x.dtype, device=CPU)
    outputs = []
    bounds = [0, *cuts, x.shape[1]]
    with torch.no_grad():
        for start, end in pairwise(bounds):
            outputs.append(mixer(x[:, start:end], SequenceInfo.contiguous(x.shape[0], end - start, start, CPU), cache))
    return torch.cat(outputs, 1), cache


def recurrence(spec: Spec, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    return recurrence_of(parameters, x, spec)


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Outputs and gradients, each relative to its own largest value. A gradient that is nothing but rounding in both
    (that of a query which sees one key) is left out."""
    rounding = 1e-2 * tolerance * max(float(tensor.detach().abs().max()) for tensor in want.values())
    told = [
        name for name in want if max(float(tensors[name].detach().abs().max()) for tensors in (got, want)) > rounding
    ]
    assert len(told) >= 3
    assert_near({name: got[name] for name in told}, {name: want[name] for name in told}, tolerance)


def states_agree(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """The tensors of two caches; angles modulo a whole turn."""
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        difference = (got[name].double() - tensor.double()).detach()
        if name == "angle":
            difference = torch.remainder(difference + math.pi, 2 * math.pi) - math.pi
        if tensor.numel():
            assert (
                float(difference.abs().max() / tensor.detach().double().abs().max().clamp_min(1e-300)) <= tolerance
            ), name
