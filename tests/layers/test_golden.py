"""Attention and Mamba-2 against tensors from independent implementations (transformers, mamba_ssm), at each case's own tolerance.

A case's json names its sources and configuration. ``y`` is the output for ``u``; ``grad.*`` belong to ``sum(y * grad_out)``;
``state@t.*`` is the decode state after t tokens. The metric is max|a - b| / max|b| per tensor.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from mixer_specs import CPU, forward, forward_in_pieces
from recurrences import assert_near, below, mamba2, relative_error
from recurrences import attention as attention_recurrence
from safetensors.torch import load_file
from torch import Tensor

from hybridlm.config.layers import AttentionSpec, Mamba2Spec
from hybridlm.layers.attention import Attention
from hybridlm.layers.mamba2 import Mamba2
from hybridlm.layers.mixer import Mixer
from hybridlm.layers.sequence import SequenceInfo

FOLDER = Path(__file__).parents[1] / "golden"
ATTENTION = ["attn_gqa_rope", "attn_gqa_rope_qknorm"]
MAMBA2 = ["mamba2_g1", "mamba2_g2", "mamba2_g2_dtlimit", "mamba2_g2_norm_before_gate"]


def load(case: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((FOLDER / f"{case}.json").read_text()), load_file(FOLDER / f"{case}.safetensors")


def spec_of(config: dict[str, Any]) -> AttentionSpec | Mamba2Spec:
    if config["mixer"] == "attention":
        return AttentionSpec(
            d_model=config["d_model"],
            n_heads=config["n_heads"],
            n_kv_heads=config["n_kv_heads"],
            head_dim=config["head_dim"],
            rope=True,
            rope_theta=config["rope_theta"],
            qk_norm=config["qk_norm"],
            window=None,
            scale=config["head_dim"] ** -0.5,
            norm_eps=config["qk_norm_eps"],
        )
    low, high = config["dt_limit"]
    return Mamba2Spec(
        d_model=config["d_model"],
        n_heads=config["nheads"],
        head_dim=config["headdim"],
        d_state=config["d_state"],
        n_groups=config["ngroups"],
        d_conv=config["d_conv"],
        chunk=config["chunk_size"],
        dt_range=(1e-3, 1e-1),
        dt_limit=(low, math.inf if high is None else high),
        a_range=(1.0, 16.0),
        norm_before_gate=config["norm_before_gate"],
        norm_eps=config["norm_eps"],
    )


def build(facts: dict[str, Any], tensors: dict[str, Tensor]) -> Mixer:
    """The layer with the case's parameters, by name and with none left over."""
    spec = spec_of(facts["config"])
    mixer = Attention(spec) if isinstance(spec, AttentionSpec) else Mamba2(spec)
    mixer.load_state_dict(below(tensors, "param."), strict=True)
    return mixer


def prefill_length(facts: dict[str, Any]) -> int:
    return facts["config"].get("prefill_len", 20)  # the attention cases name none


def test_every_case_is_tested():
    assert {path.stem for path in FOLDER.glob("*.safetensors")} == {*ATTENTION, *MAMBA2}


@pytest.mark.parametrize("case", [*ATTENTION, *MAMBA2])
def test_output_and_gradients(case):
    facts, tensors = load(case)
    mixer = build(facts, tensors)
    u = tensors["u"].requires_grad_()
    y = forward(mixer, u)
    assert relative_error(y, tensors["y"]) < facts["tolerance"]["y"]
    leaves = {"u": u, **dict(mixer.named_parameters())}
    grads = torch.autograd.grad((y * tensors["grad_out"]).sum(), list(leaves.values()))
    assert_near(dict(zip(leaves, grads, strict=True)), below(tensors, "grad."), facts["tolerance"]["grad"])


@pytest.mark.parametrize("case", [*ATTENTION, *MAMBA2])
def test_decoding_after_the_prefill(case):
    """One token at a time from ``prefill_len`` on gives y."""
    facts, tensors = load(case)
    start, total = prefill_length(facts), tensors["u"].shape[1]
    y, _ = forward_in_pieces(build(facts, tensors), tensors["u"], list(range(start, total)), total)
    assert relative_error(y, tensors["y"]) < facts["tolerance"]["y"]


@pytest.mark.parametrize("way", ["prefill", "decode"])
@pytest.mark.parametrize("case", MAMBA2)
def test_mamba2_states(case, way):
    """After the prefill, and after the last token. The golden convolution state has K columns, channels first; ours the last K - 1."""
    facts, tensors = load(case)
    start, total = prefill_length(facts), tensors["u"].shape[1]
    mixer, tolerance = build(facts, tensors), facts["tolerance"]["state"]
    for length in (start, total):
        cuts = [] if way == "prefill" else list(range(min(start, length - 1), length))
        _, cache = forward_in_pieces(mixer, tensors["u"][:, :length], cuts, total)
        conv = tensors[f"state@{length}.conv_state"][..., 1:].transpose(1, 2)
        assert relative_error(cache.tensors()["conv"], conv) < tolerance
        assert relative_error(cache.tensors()["ssm"], tensors[f"state@{length}.ssm_state"]) < tolerance


@pytest.mark.parametrize("case", ATTENTION)
def test_attention_states(case):
    """Keys are cached after the rotation."""
    facts, tensors = load(case)
    start, total = prefill_length(facts), tensors["u"].shape[1]
    _, cache = forward_in_pieces(build(facts, tensors), tensors["u"], list(range(start, total)), total)
    assert_near(cache.tensors(), below(tensors, f"state@{total}."), facts["tolerance"]["state"])


@pytest.mark.parametrize("case", MAMBA2)
def test_decoding_from_the_golden_state(case):
    """The state of another implementation continues here: the layout is right, not only consistent with itself."""
    facts, tensors = load(case)
    start, total = prefill_length(facts), tensors["u"].shape[1]
    mixer = build(facts, tensors)
    cache = mixer.new_cache(tensors["u"].shape[0], total, dtype=torch.float32, device=CPU)
    conv = tensors[f"state@{start}.conv_state"][..., 1:].transpose(1, 2).contiguous()
    cache.replace({"conv": conv, "ssm": tensors[f"state@{start}.ssm_state"].clone()})
    rows, line = tensors["u"].shape[0], []
    with torch.no_grad():
        for t in range(start, total):
            line.append(mixer(tensors["u"][:, t : t + 1], SequenceInfo.contiguous(rows, 1, t, CPU), cache))
    assert relative_error(torch.cat(line, 1), tensors["y"][:, start:]) < facts["tolerance"]["y"]


@pytest.mark.parametrize("case", [*ATTENTION, *MAMBA2])
def test_the_recurrences_of_these_tests_agree_too(case):
    """What the other tests compare against is itself held by the golden tensors."""
    facts, tensors = load(case)
    spec = spec_of(facts["config"])
    leaves = {name: tensor.double().requires_grad_() for name, tensor in {"u": tensors["u"], **below(tensors, "param.")}.items()}
    y = (attention_recurrence if isinstance(spec, AttentionSpec) else mamba2)(leaves, leaves["u"], spec)[0]
    assert relative_error(y, tensors["y"]) < facts["tolerance"]["y"]
    grads = torch.autograd.grad((y * tensors["grad_out"]).sum(), list(leaves.values()))
    assert_near(dict(zip(leaves, grads, strict=True)), below(tensors, "grad."), facts["tolerance"]["grad"])
