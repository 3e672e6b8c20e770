"""DeepSeek-V3: multi-head latent attention, dense FFNs first and sigmoid mixtures after."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

from hybridlm.config.model import ModelConfig
from hybridlm.interop.architecture import (
    Architecture,
    Need,
    layers_needs,
    pattern_text,
    plain_needs,
    spec_needs,
    the_spec,
    uniform_needs,
)
from hybridlm.interop.blocks import (
    DENSE,
    all_same,
    edges,
    latent_scale_needs,
    mla_names,
    shared_expert_needs,
    sigmoid_mixture,
    sigmoid_needs,
)
from hybridlm.interop.links import Link, same

_FIELDS = {
    "num_attention_heads": "n_heads",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "rope_theta": "rope_theta",
    "rope_interleave": "rope_interleave",
}
_EXPERTS = {
    "n_routed_experts": "n_experts",
    "num_experts_per_tok": "top_k",
    "moe_intermediate_size": "d_expert",
    "routed_scaling_factor": "routed_scaling_factor",
    "norm_topk_prob": "norm_topk_prob",
    "n_group": "n_expert_groups",
    "topk_group": "topk_groups",
}


class DeepseekV3(Architecture):
    """Its attention scale is that of the whole query, rotated part included."""

    name: ClassVar[str] = "DeepseekV3ForCausalLM"
    model_type: ClassVar[str] = "deepseek_v3"
    # The extra layers of multi-token prediction take no part in the model's logits.
    ignored: ClassVar[frozenset[str]] = frozenset({"head_dim", "num_nextn_predict_layers", "num_mtp_layers"})
    readers: ClassVar[tuple[str, ...]] = ("vLLM",)

    def needs(self, model: ModelConfig) -> Iterator[Need]:
        name = self.name
        yield from plain_needs(model, name)
        yield from layers_needs(model, name, {"mla": ("mlp", "moe")})
        kinds = [layer.ffn_kind.replace("none", "mlp") for layer in model.layers]
        if kinds != sorted(kinds):
            text = pattern_text(zip((layer.letter for layer in model.layers), sorted(kinds), strict=True))
            yield Need("FFNs", ",".join(kinds), f"{name} has mlp first, then moe", (f"model.pattern='{text}'",))
        yield from uniform_needs(model, "mla", _FIELDS.values(), name)
        yield from spec_needs(model, "mla", {"rope": True}, name)
        yield from spec_needs(model, "mlp", {"activation": "swiglu"}, name)
        yield from latent_scale_needs(model, name)
        yield from sigmoid_needs(model, "swiglu", name)
        yield from shared_expert_needs(model, name)

    def config(self, model: ModelConfig, vocab: int) -> dict[str, Any]:
        mla, mlp, moe = (the_spec(model, kind) for kind in ("mla", "mlp", "moe"))
        dense = sum(layer.ffn_kind == "mlp" for layer in model.layers)
        config = {
            "vocab_size": vocab,
            "hidden_size": model.d_model,
            "num_hidden_layers": len(model.layers),
            "num_key_value_heads": mla.n_heads,
            "first_k_dense_replace": dense,
            "hidden_act": "silu",
            "rms_norm_eps": model.norm_eps,
            "tie_word_embeddings": model.tie_embeddings,
            "attention_bias": False,
            "num_nextn_predict_layers": 0,
            "intermediate_size": mlp.d_ff if mlp else moe.d_expert,
            **{theirs: getattr(mla, ours) for theirs, ours in _FIELDS.items()},
        }
        if moe:
            config |= {theirs: getattr(moe, ours) for theirs, ours in _EXPERTS.items()}
            config["n_shared_experts"] = moe.d_shared // moe.d_expert
        return config

    def links(self, model: ModelConfig) -> Iterable[Link]:
        yield from edges(model)
        for i, layer in enumerate(model.layers):
            ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
            yield same(f"{ours}mixer_norm.weight", f"{theirs}input_layernorm.weight")
            names = mla_names(layer.params.q_lora_rank)  # type: ignore[attr-defined]
            yield from all_same(names, f"{ours}mixer.", f"{theirs}self_attn.")
            yield same(f"{ours}ffn_norm.weight", f"{theirs}post_attention_layernorm.weight")
            if layer.ffn_kind == "moe":
                yield from sigmoid_mixture(f"{ours}ffn.", f"{theirs}mlp.", layer.ffn)
            else:
                yield from all_same(DENSE, f"{ours}ffn.", f"{theirs}mlp.")

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        layers, dense = config["num_hidden_layers"], config["first_k_dense_replace"]
        section: dict[str, Any] = {
            "d_model": config["hidden_size"],
            "pattern": ["L:mlp" if i < dense else "L:moe" for i in range(layers)],
            "norm_eps": config["rms_norm_eps"],
            "tie_embeddings": config["tie_word_embeddings"],
            "mla": {"rope": True} | {ours: config[theirs] for theirs, ours in _FIELDS.items()},
            "mlp": {"d_ff": config["intermediate_size"], "activation": "swiglu"},
        }
        if dense < layers:
            section["moe"] = {ours: config[theirs] for theirs, ours in _EXPERTS.items()} | {
                "activation": "swiglu",
                "router": "sigmoid",
                "n_shared_experts": config["n_shared_experts"],
            }
        return section
