"""Kimi Linear: Kimi Delta Attention and latent attention without positions, dense FFNs or sigmoid mixtures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

from hybridlm.config.model import ModelConfig
from hybridlm.interop.architecture import (
    Architecture,
    Need,
    fit_needs,
    layers_needs,
    plain_needs,
    spec_needs,
    the_spec,
    uniform_needs,
)
from hybridlm.interop.blocks import (
    DENSE,
    all_same,
    edges,
    gate_and_up,
    latent_scale_needs,
    mla_names,
    shared_expert_needs,
    sigmoid_needs,
)
from hybridlm.interop.links import Link, changed, same, split, stacked

_MLA = {
    "num_attention_heads": "n_heads",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
}
_EXPERTS = {
    "num_experts": "n_experts",
    "num_experts_per_token": "top_k",
    "moe_intermediate_size": "d_expert",
    "routed_scaling_factor": "routed_scaling_factor",
    "moe_renormalize": "norm_topk_prob",
    "num_expert_group": "n_expert_groups",
    "topk_group": "topk_groups",
}
_KDA = (
    *(f"{name}_proj.weight" for name in ("q", "k", "v", "b", "f_a", "f_b", "g_a", "g_b", "o")),
    "o_norm.weight",
    "dt_bias",
)


class KimiLinear(Architecture):
    """Layers are numbered from 1 in its own lists; here they are named one by one."""

    name: ClassVar[str] = "KimiLinearForCausalLM"
    model_type: ClassVar[str] = "kimi_linear"
    readers: ClassVar[tuple[str, ...]] = ("vLLM",)
    ignored: ClassVar[frozenset[str]] = frozenset({"head_dim", "num_nextn_predict_layers"})

    def needs(self, model: ModelConfig) -> Iterator[Need]:
        name = self.name
        yield from plain_needs(model, name)
        yield from layers_needs(model, name, dict.fromkeys(("kda", "mla"), ("mlp", "moe")), some="mla")
        yield from spec_needs(model, "mla", {"rope": False, "q_lora_rank": None}, name)
        yield from uniform_needs(model, "mla", _MLA.values(), name)
        yield from latent_scale_needs(model, name)
        legal = {"use_conv": True, "allow_neg_eigval": False, "gate_bias": False, "lower_bound": None}
        yield from spec_needs(model, "kda", legal, name)
        yield from uniform_needs(model, "kda", ("n_k_heads", "n_v_heads", "head_k_dim", "head_v_dim", "d_conv"), name)
        reason = f"{name} has as many heads of keys as of values, of one width"
        yield from fit_needs(
            model,
            "kda",
            "n_k_heads",
            lambda spec: (spec.n_k_heads, spec.head_k_dim) == (spec.n_v_heads, spec.head_v_dim),
            reason,
            ("n_k_heads=null", "head_v_dim=null"),
        )
        yield from spec_needs(model, "mlp", {"activation": "swiglu"}, name)
        yield from sigmoid_needs(model, "swiglu", name)
        yield from shared_expert_needs(model, name)

    def config(self, model: ModelConfig, vocab: int) -> dict[str, Any]:
        mla, kda, mlp, moe = (the_spec(model, kind) for kind in ("mla", "kda", "mlp", "moe"))
        config = {
            "vocab_size": vocab,
            "hidden_size": model.d_model,
            "num_hidden_layers": len(model.layers),
            "layer_types": [_TYPES[layer.kind] for layer in model.layers],
            "mlp_layer_types": ["sparse" if layer.ffn_kind == "moe" else "dense" for layer in model.layers],
            "num_key_value_heads": mla.n_heads,
            "intermediate_size": mlp.d_ff if mlp else moe.d_expert,
            "hidden_act": "silu",
            "rms_norm_eps": model.norm_eps,
            "tie_word_embeddings": model.tie_embeddings,
            "attention_bias": False,
            **{theirs: getattr(mla, ours) for theirs, ours in _MLA.items()},
        }
        if kda:
            shape = {"linear_head_dim": kda.head_k_dim, "linear_num_heads": kda.n_v_heads}
            config |= shape | {"linear_conv_kernel_dim": kda.d_conv}
        if moe:
            config |= {theirs: getattr(moe, ours) for theirs, ours in _EXPERTS.items()}
            config["num_shared_experts"] = moe.d_shared // moe.d_expert
        return config

    def normal(self, fields: dict[str, Any]) -> dict[str, Any]:
        if "sparse" not in fields["mlp_layer_types"]:  # fields of experts that no layer has
            fields = {key: value for key, value in fields.items() if key not in {*_EXPERTS, "num_shared_experts"}}
        return fields

    def links(self, model: ModelConfig) -> Iterable[Link]:
        yield from edges(model, ties=False)
        for i, layer in enumerate(model.layers):
            ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
            yield same(f"{ours}mixer_norm.weight", f"{theirs}input_layernorm.weight")
            mixer, spec = f"{theirs}self_attn.", layer.params
            if layer.kind == "mla":
                yield from all_same(mla_names(None), f"{ours}mixer.", mixer)
            else:
                yield from all_same(_KDA, f"{ours}mixer.", mixer)
                yield changed(
                    f"{ours}mixer.A_log", f"{mixer}A_log", lambda a: a.view(1, 1, -1, 1), lambda a: a.flatten()
                )
                yield _convolution(f"{ours}mixer.conv1d.weight", mixer, spec.qkv)  # type: ignore[attr-defined]
            yield same(f"{ours}ffn_norm.weight", f"{theirs}post_attention_layernorm.weight")
            if layer.ffn_kind == "moe":
                yield from _mixture(f"{ours}ffn.", f"{theirs}block_sparse_moe.", layer.ffn)
            else:
                yield from all_same(DENSE, f"{ours}ffn.", f"{theirs}block_sparse_moe.")

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        letters, ffns = {"full_attention": "L", "linear_attention": "K"}, {"dense": "mlp", "sparse": "moe"}
        kinds = zip(config["layer_types"], config["mlp_layer_types"], strict=True)
        section: dict[str, Any] = {
            "d_model": config["hidden_size"],
            "pattern": [f"{letters[mixer]}:{ffns[ffn]}" for mixer, ffn in kinds],
            "norm_eps": config["rms_norm_eps"],
            "tie_embeddings": config["tie_word_embeddings"],
            "mla": {"rope": False} | {ours: config[theirs] for theirs, ours in _MLA.items()},
            "mlp": {"d_ff": config["intermediate_size"], "activation": "swiglu"},
        }
        if "linear_attention" in config["layer_types"]:
            section["kda"] = {
                "head_k_dim": config["linear_head_dim"],
                "n_v_heads": config["linear_num_heads"],
                "d_conv": config["linear_conv_kernel_dim"],
            }
        if "sparse" in config["mlp_layer_types"]:
            experts = {ours: config[theirs] for theirs, ours in _EXPERTS.items()}
            own = {"activation": "swiglu", "router": "sigmoid", "n_shared_experts": config["num_shared_experts"]}
            section["moe"] = experts | own
        return section


_TYPES = {"mla": "full_attention", "kda": "linear_attention"}


def _convolution(ours: str, theirs: str, sizes: tuple[int, int, int]) -> Link:
    """One convolution of ours over queries, keys and values, three on disk."""
    link = split([f"{theirs}{one}_conv1d.weight" for one in "qkv"], ours, sizes)
    return Link(link.theirs, link.ours, link.take, link.give)


def _mixture(ours: str, theirs: str, moe: Any) -> Iterator[Link]:
    yield same(f"{ours}gate.weight", f"{theirs}gate.weight")
    yield same(f"{ours}gate.e_score_correction_bias", f"{theirs}gate.e_score_correction_bias")
    experts = [f"{theirs}experts.{e}." for e in range(moe.n_experts)]
    yield gate_and_up(
        f"{ours}experts.gate_up_proj", [f"{one}{name}.weight" for one in experts for name in ("w1", "w3")]
    )
    yield stacked(f"{ours}experts.down_proj", [f"{one}w2.weight" for one in experts])
    yield from all_same(DENSE, f"{ours}shared_experts.", f"{theirs}shared_experts.")
