"""GraniteMoeHybrid: Mamba-2 and grouped-query attention in any order, with SwiGLU or a softmax mixture after each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

from hybridlm.config.model import ModelConfig
from hybridlm.interop.architecture import (
    Architecture,
    Need,
    head_needs,
    layers_needs,
    plain_needs,
    rotary_needs,
    spec_needs,
    the_spec,
    uniform_needs,
)
from hybridlm.interop.blocks import (
    MAMBA2,
    all_same,
    attention_names,
    edges,
    mamba2_fields,
    mamba2_needs,
    mamba2_section,
)
from hybridlm.interop.links import Link, joined, same


class GraniteMoeHybrid(Architecture):
    """Its names of layers, "mamba" and "attention", are those that vLLM and llama.cpp read too; transformers maps them
    to its newer ones."""

    name: ClassVar[str] = "GraniteMoeHybridForCausalLM"
    model_type: ClassVar[str] = "granitemoehybrid"
    readers: ClassVar[tuple[str, ...]] = ("vLLM",)
    own_widths: ClassVar[bool] = False  # of heads, of what is rotated of them, and of Mamba-2's inner channels

    def needs(self, model: ModelConfig) -> Iterator[Need]:
        name = self.name
        yield from plain_needs(model, name, scales=True)
        ffn = model.layers[0].ffn_kind
        yield from layers_needs(model, name, {"mamba2": [ffn], "attention": [ffn]}, some="attention")
        yield from spec_needs(model, "attention", {"qk_norm": False, "gate": False, "window": None}, name)
        yield from uniform_needs(model, "attention", ("n_heads", "n_kv_heads", "rope", "rope_theta", "scale"), name)
        if not self.own_widths:
            yield from head_needs(model, name)
            yield from rotary_needs(model, name, 1.0)
        yield from mamba2_needs(model, name, expand=not self.own_widths)
        yield from spec_needs(model, "mlp", {"activation": "swiglu"}, name)
        mixture = {"activation": "swiglu", "router": "softmax", "norm_topk_prob": True, "routed_scaling_factor": 1.0}
        yield from spec_needs(model, "moe", mixture | {"shared_gate": False}, name)

    def config(self, model: ModelConfig, vocab: int) -> dict[str, Any]:
        attention, mlp, moe = (the_spec(model, kind) for kind in ("attention", "mlp", "moe"))
        shared = mlp.d_ff if mlp else moe.d_shared if moe else 0
        return {
            "vocab_size": vocab,
            "hidden_size": model.d_model,
            "num_hidden_layers": len(model.layers),
            "layer_types": ["mamba" if layer.kind == "mamba2" else "attention" for layer in model.layers],
            "num_attention_heads": attention.n_heads,
            "num_key_value_heads": attention.n_kv_heads,
            "attention_bias": False,
            "attention_multiplier": attention.scale,
            "embedding_multiplier": model.embedding_scale,
            "residual_multiplier": model.residual_scale,
            "logits_scaling": 1 / model.logit_scale,
            "position_embedding_type": "rope" if attention.rope else None,
            "rope_theta": attention.rope_theta,
            "rms_norm_eps": model.norm_eps,
            "hidden_act": "silu",
            "tie_word_embeddings": model.tie_embeddings,
            # llama.cpp reads the width of the dense FFN from intermediate_size.
            "intermediate_size": moe.d_expert if moe else shared,
            "shared_intermediate_size": shared,
            "num_local_experts": moe.n_experts if moe else 0,
            "num_experts_per_tok": moe.top_k if moe else 0,
            "mamba_conv_bias": True,
            "mamba_proj_bias": False,
            **mamba2_fields(model),
        }

    def links(self, model: ModelConfig) -> Iterable[Link]:
        yield from edges(model)
        for i, layer in enumerate(model.layers):
            ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
            yield same(f"{ours}mixer_norm.weight", f"{theirs}input_layernorm.weight")
            if layer.kind == "attention":
                yield from all_same(attention_names(qk_norm=False), f"{ours}mixer.", f"{theirs}self_attn.")
            else:
                yield from all_same(MAMBA2, f"{ours}mixer.", f"{theirs}mamba.")
            if layer.ffn_kind == "none":
                continue
            yield same(f"{ours}ffn_norm.weight", f"{theirs}post_attention_layernorm.weight")
            dense: str | None = f"{ours}ffn."
            if layer.ffn_kind == "moe":
                experts, block = f"{ours}ffn.experts.", f"{theirs}block_sparse_moe."
                yield same(f"{experts}gate_up_proj", f"{block}input_linear.weight")
                yield same(f"{experts}down_proj", f"{block}output_linear.weight")
                yield same(f"{ours}ffn.gate.weight", f"{block}router.layer.weight")
                dense = f"{ours}ffn.shared_experts." if layer.ffn.shared else None  # type: ignore[union-attr]
            if dense is not None:
                gate_up = (f"{dense}gate_proj.weight", f"{dense}up_proj.weight")
                yield joined(gate_up, f"{theirs}shared_mlp.input_linear.weight")
                yield same(f"{dense}down_proj.weight", f"{theirs}shared_mlp.output_linear.weight")

    def normal(self, fields: dict[str, Any]) -> dict[str, Any]:
        old = {"linear_attention": "mamba", "full_attention": "attention"}
        fields["layer_types"] = [old.get(kind, kind) for kind in fields["layer_types"]]
        if "mamba" not in fields["layer_types"]:  # fields that no layer has
            fields = {key: value for key, value in fields.items() if not key.startswith("mamba_")}
        if not fields["num_local_experts"]:  # then it is read by llama.cpp alone
            fields["intermediate_size"] = fields["shared_intermediate_size"]
        return fields

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        ffn = "moe" if config["num_local_experts"] else "mlp" if config["shared_intermediate_size"] else "none"
        section: dict[str, Any] = {
            "d_model": config["hidden_size"],
            "pattern": [f"{'M2' if kind == 'mamba' else 'T'}:{ffn}" for kind in config["layer_types"]],
            "norm_eps": config["rms_norm_eps"],
            "tie_embeddings": config["tie_word_embeddings"],
            "embedding_scale": config["embedding_multiplier"],
            "residual_scale": config["residual_multiplier"],
            "logit_scale": 1 / config["logits_scaling"],
            "attention": {
                "n_heads": config["num_attention_heads"],
                "n_kv_heads": config["num_key_value_heads"],
                "scale": config["attention_multiplier"],
                "rope": config["position_embedding_type"] == "rope",
                "rope_theta": config["rope_theta"],
            },
            "mamba2": mamba2_section(config) if "mamba" in config["layer_types"] else {},
        }
        if ffn == "mlp":
            section["mlp"] = {"d_ff": config["shared_intermediate_size"], "activation": "swiglu"}
        if ffn == "moe":
            section["moe"] = {
                "n_experts": config["num_local_experts"],
                "top_k": config["num_experts_per_tok"],
                "d_expert": config["intermediate_size"],
                "n_shared_experts": int(config["shared_intermediate_size"] > 0),
                "d_shared": config["shared_intermediate_size"] or None,
                "activation": "swiglu",
                "router": "softmax",
            }
        return section
