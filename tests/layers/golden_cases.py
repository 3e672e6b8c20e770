"""The golden cases: tensors from independent implementations, and the layer that each describes.

A case's json names its sources, configuration and tolerances. ``y`` is the output for ``u``; ``grad.*`` belong to
``sum(y * grad_out)``; ``state@t.*`` is the decode state after t tokens. What a case's configuration does not name keeps
the default of its section.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from recurrences import below
from safetensors.torch import load_file
from torch import Tensor

from hybridlm.config.ffns.moe import MoEConfig, MoESpec
from hybridlm.config.layers import Spec
from hybridlm.config.mixers.attention import AttentionConfig, AttentionSpec
from hybridlm.config.mixers.gdn import GDNConfig
from hybridlm.config.mixers.kda import KDAConfig
from hybridlm.config.mixers.mamba1 import Mamba1Config
from hybridlm.config.mixers.mamba2 import Mamba2Config, Mamba2Spec
from hybridlm.config.mixers.mamba3 import Mamba3Config, Mamba3Spec
from hybridlm.config.mixers.mla import MLAConfig, MLASpec
from hybridlm.config.model import ModelConfig

FOLDER = Path(__file__).parents[1] / "golden"
ATTENTION = ["attn_gqa_rope", "attn_gqa_rope_qknorm"]
MAMBA1 = ["mamba1", "mamba1_short_bias"]
MAMBA2 = ["mamba2_g1", "mamba2_g2", "mamba2_g2_dtlimit", "mamba2_g2_norm_before_gate"]
MAMBA3 = [
    *(f"mamba3_siso_{name}" for name in ("rope05", "rope05_g2", "rope05_outnorm", "rope05_softplusA", "rope10")),
    *(f"mamba3_mimo_{name}" for name in ("r2_rope05_softplusA", "r4_rope05", "r4_rope05_outnorm", "r4_rope10")),
]
MLA = ["mla_no_qlora", "mla_qlora", "mla_qlora_no_interleave"]
MOE_SOFTMAX = ["moe_mixtral", "moe_olmoe_nonorm"]
MOE = ["moe_deepseek_v3", "moe_deepseek_v3_groups", "moe_deepseek_v3_nonorm", *MOE_SOFTMAX]
GDN = [
    f"gdn{name}" for name in ("", "_gva", "_gva_qkvz", "_noconv", "_nogate", "_olmo", "_olmo_neg_eigval", "_small_keys")
]
KDA = [f"kda{name}" for name in ("", "_gva_neg_eigval", "_lower_bound", "_small_keys")]
MIXERS = [*ATTENTION, *MAMBA1, *MAMBA2, *MAMBA3, *MLA, *GDN, *KDA]
SCANS = [*MAMBA1, *MAMBA2, *MAMBA3, *GDN, *KDA]


def load(case: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What is known of a case, and its tensors; parameters and their gradients have our names and row orders."""
    facts, tensors = json.loads((FOLDER / f"{case}.json").read_text()), load_file(FOLDER / f"{case}.safetensors")
    if facts["config"]["mixer"] in ("gdn", "kda"):
        for prefix in ("param.", "grad."):
            theirs = {name: tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
            ours = delta_parameters(facts["config"], below(theirs, prefix))
            tensors |= {f"{prefix}{name}": tensor for name, tensor in ours.items()}
    return facts, tensors


def delta_parameters(config: dict[str, Any], theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of Qwen3-Next, Qwen3.5, Olmo-Hybrid, Kimi Linear and flash-linear-attention as gdn and kda have
    them."""
    theirs = {RENAMED.get(name, name.removeprefix("forget_gate.")): tensor for name, tensor in theirs.items()}
    keys, values = config["n_k_heads"] * config["head_k_dim"], config["n_v_heads"] * config["head_v_dim"]
    if config["layout"] == "qkvz_ba":  # rows of a key head together, those of its value heads after its own
        shared = config["n_v_heads"] // config["n_k_heads"]
        value = shared * config["head_v_dim"]
        fused = {"in_proj_qkvz": ([config["head_k_dim"]] * 2 + [value] * 2, "qkvg"), "in_proj_ba": ([shared] * 2, "ba")}
        for name, (sizes, letters) in fused.items():
            weight = theirs.pop(f"{name}.weight")
            parts = weight.unflatten(0, (config["n_k_heads"], -1)).split(sizes, 1)
            theirs |= {f"{letter}_proj.weight": part.flatten(0, 1) for letter, part in zip(letters, parts, strict=True)}
    if "in_proj_qkv.weight" in theirs:
        parts = theirs.pop("in_proj_qkv.weight").split([keys, keys, values])
        theirs |= {f"{letter}_proj.weight": part for letter, part in zip("qkv", parts, strict=True)}
    if "q_conv1d.weight" in theirs:
        theirs["conv1d.weight"] = torch.cat([theirs.pop(f"{letter}_conv1d.weight") for letter in "qkv"])
    if "A_log" in theirs:
        theirs["A_log"] = theirs["A_log"].flatten()
    return theirs


RENAMED = {
    "in_proj_z.weight": "g_proj.weight",
    "in_proj_b.weight": "b_proj.weight",
    "in_proj_a.weight": "a_proj.weight",
    "norm.weight": "o_norm.weight",
    "out_proj.weight": "o_proj.weight",
    "f_proj.0.weight": "f_a_proj.weight",
    "f_proj.1.weight": "f_b_proj.weight",
    "g_proj.0.weight": "g_a_proj.weight",
    "g_proj.1.weight": "g_b_proj.weight",
    "g_proj.1.bias": "g_b_proj.bias",
}


def prefill_length(facts: dict[str, Any]) -> int:
    return facts["config"].get("prefill_len", 20)  # the attention cases name none


def mixer_spec(config: dict[str, Any]) -> Spec:
    model = ModelConfig(d_model=config["d_model"], norm_eps=config.get("norm_eps", config.get("qk_norm_eps", 1e-5)))
    match config["mixer"]:
        case "attention":
            return attention_spec(config, model)
        case "mamba1":
            names = ("d_state", "d_conv", "expand", "dt_rank", "bias")
            return Mamba1Config(**{name: config[name] for name in names}).resolve(model, "mamba1")
        case "mamba2":
            return mamba2_spec(config, model)
        case "mamba3":
            return mamba3_spec(config, model)
        case "mla":
            names = ("n_heads", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
            names += ("rope_theta", "rope_interleave")
            return MLAConfig(**{name: config[name] for name in names}).resolve(model, "mla")
        case "gdn":
            return GDNConfig(**delta_options(config), use_gate=config["gate"] != "none").resolve(model, "gdn")
        case "kda":
            options = {"gate_bias": config["layout"] == "fla_kda", "lower_bound": config["gate_lower_bound"]}
            return KDAConfig(**delta_options(config), **options).resolve(model, "kda")
        case other:
            raise ValueError(other)


def delta_options(config: dict[str, Any]) -> dict[str, Any]:
    names = ("n_k_heads", "n_v_heads", "head_k_dim", "head_v_dim", "allow_neg_eigval")
    convolution = {"use_conv": config["d_conv"] > 0, "d_conv": config["d_conv"] or 4}
    return {name: config[name] for name in names} | convolution


def attention_spec(config: dict[str, Any], model: ModelConfig) -> AttentionSpec:
    names = ("n_heads", "n_kv_heads", "head_dim", "rope_theta", "qk_norm")
    return AttentionConfig(rope=True, **{name: config[name] for name in names}).resolve(model, "attention")


def mamba2_spec(config: dict[str, Any], model: ModelConfig) -> Mamba2Spec:
    low, high = config["dt_limit"]
    section = Mamba2Config(
        d_state=config["d_state"],
        d_conv=config["d_conv"],
        expand=config["expand"],
        head_dim=config["headdim"],
        n_groups=config["ngroups"],
        chunk=config["chunk_size"],
        dt_limit=(low, math.inf if high is None else high),
        norm_before_gate=config["norm_before_gate"],
    )
    return section.resolve(model, "mamba2")


def mamba3_spec(config: dict[str, Any], model: ModelConfig) -> Mamba3Spec:
    section = Mamba3Config(
        d_state=config["d_state"],
        expand=config["expand"],
        head_dim=config["headdim"],
        n_groups=config["ngroups"],
        mimo_rank=config["mimo_rank"] if config["is_mimo"] else None,
        rope_fraction=config["rope_fraction"],
        a_activation=config["a_activation"],
        a_floor=config["A_floor"],
        outproj_norm=config["is_outproj_norm"],
    )
    return section.resolve(model, "mamba3")


def moe_spec(config: dict[str, Any]) -> MoESpec:
    section = MoEConfig(
        n_experts=config["n_experts"],
        top_k=config["top_k"],
        d_expert=config["expert_intermediate"],
        n_shared_experts=config["n_shared_experts"],
        router=config["router"],
        norm_topk_prob=config["norm_topk_prob"],
        routed_scaling_factor=config["routed_scaling_factor"],
        n_expert_groups=config["n_group"],
        topk_groups=config["topk_group"],
    )
    return section.resolve(ModelConfig(d_model=config["d_model"]), "moe")


def golden_states(spec: Spec, tensors: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    """The state after ``length`` tokens under our names. A golden convolution state has K columns, channels first; ours
    the last K - 1."""
    found = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"state@{length}.")}
    if isinstance(spec, AttentionSpec | MLASpec):
        return found
    states = {name.removesuffix("_state"): tensor.clone() for name, tensor in found.items()}
    if "conv" in states:
        states["conv"] = states["conv"][..., 1:].transpose(1, 2).contiguous()
    return states


def circular(name: str, tensor: Tensor, like: Tensor) -> Tensor:
    """An angle moved by whole turns to where it is nearest to ``like``; any other state as it is."""
    if name != "angle":
        return tensor
    turn = 2 * math.pi
    return tensor - turn * torch.round((tensor - like) / turn)
