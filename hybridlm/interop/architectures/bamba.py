"""Bamba: Mamba-2 and attention with half of each head rotated, a SwiGLU after each."""

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
    scale_needs,
    spec_needs,
    the_spec,
    uniform_needs,
)
from hybridlm.interop.blocks import (
    DENSE,
    MAMBA2,
    all_same,
    attention_names,
    edges,
    mamba2_fields,
    mamba2_needs,
    mamba2_section,
)
from hybridlm.interop.links import Link, same


class Bamba(Architecture):
    """What GraniteMoeHybrid has without multipliers, rotated; transformers fixes the share that is rotated."""

    name: ClassVar[str] = "BambaForCausalLM"
    model_type: ClassVar[str] = "bamba"
    ignored: ClassVar[frozenset[str]] = frozenset({"partial_rotary_factor"})

    def needs(self, model: ModelConfig) -> Iterator[Need]:
        name = self.name
        yield from plain_needs(model, name)
        yield from layers_needs(model, name, {"mamba2": ["mlp"], "attention": ["mlp"]}, some="attention")
        yield from spec_needs(model, "attention", {"qk_norm": False, "gate": False, "window": None, "rope": True}, name)
        fields = ("n_heads", "n_kv_heads", "head_dim", "rope_theta")
        yield from uniform_needs(model, "attention", fields, name)
        yield from rotary_needs(model, name, 0.5)
        yield from head_needs(model, name)
        yield from scale_needs(model, "attention", lambda spec: spec.head_dim, name)
        yield from mamba2_needs(model, name)
        yield from spec_needs(model, "mlp", {"activation": "swiglu"}, name)

    def config(self, model: ModelConfig, vocab: int) -> dict[str, Any]:
        attention = the_spec(model, "attention")
        return {
            "vocab_size": vocab,
            "hidden_size": model.d_model,
            "num_hidden_layers": len(model.layers),
            "attn_layer_indices": [i for i, layer in enumerate(model.layers) if layer.kind == "attention"],
            "num_attention_heads": attention.n_heads,
            "num_key_value_heads": attention.n_kv_heads,
            "attention_bias": False,
            "mlp_bias": False,
            "rope_theta": attention.rope_theta,
            "rms_norm_eps": model.norm_eps,
            "hidden_act": "silu",
            "intermediate_size": the_spec(model, "mlp").d_ff,
            "tie_word_embeddings": model.tie_embeddings,
            "mamba_conv_bias": True,
            "mamba_proj_bias": False,
            **mamba2_fields(model),
        }

    def links(self, model: ModelConfig) -> Iterable[Link]:
        yield from edges(model, norm="model.final_layernorm")
        for i, layer in enumerate(model.layers):
            ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
            yield same(f"{ours}mixer_norm.weight", f"{theirs}input_layernorm.weight")
            if layer.kind == "attention":
                yield from all_same(attention_names(qk_norm=False), f"{ours}mixer.", f"{theirs}self_attn.")
            else:
                yield from all_same(MAMBA2, f"{ours}mixer.", f"{theirs}mamba.")
            yield same(f"{ours}ffn_norm.weight", f"{theirs}pre_ff_layernorm.weight")
            yield from all_same(DENSE, f"{ours}ffn.", f"{theirs}feed_forward.")

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        attention = set(config["attn_layer_indices"])
        return {
            "d_model": config["hidden_size"],
            "pattern": ["T:mlp" if i in attention else "M2:mlp" for i in range(config["num_hidden_layers"])],
            "norm_eps": config["rms_norm_eps"],
            "tie_embeddings": config["tie_word_embeddings"],
            "attention": {
                "n_heads": config["num_attention_heads"],
                "n_kv_heads": config["num_key_value_heads"],
                "rope": True,
                "rope_theta": config["rope_theta"],
                "rope_fraction": 0.5,
            },
            "mamba2": mamba2_section(config),
            "mlp": {"d_ff": config["intermediate_size"], "activation": "swiglu"},
        }
