"""Qwen3.5 (text): gated DeltaNet and gated attention with QK-norm, a SwiGLU after each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import torch

from hybridlm.config.model import ModelConfig
from hybridlm.interop.architecture import (
    Architecture,
    Need,
    layers_needs,
    plain_needs,
    scale_needs,
    spec_needs,
    the_spec,
    uniform_needs,
)
from hybridlm.interop.blocks import DENSE, all_same
from hybridlm.interop.links import Link, Tensors, changed, constant, same, split

_OPEN = 40.0  # a gate's logit whose sigmoid is 1 in float32


class Qwen35(Architecture):
    """Norms of blocks and heads are stored as the difference from 1. A head's rows of q_proj are its query, then its
    gate; where ours has no gate, biases hold theirs open."""

    name: ClassVar[str] = "Qwen3_5ForCausalLM"
    model_type: ClassVar[str] = "qwen3_5_text"
    readers: ClassVar[tuple[str, ...]] = ("vLLM",)
    ignored: ClassVar[frozenset[str]] = frozenset({"full_attention_interval"})

    def needs(self, model: ModelConfig) -> Iterator[Need]:
        name = self.name
        yield from plain_needs(model, name)
        yield from layers_needs(model, name, {"gdn": ["mlp"], "attention": ["mlp"]}, some="attention")
        yield from spec_needs(model, "attention", {"qk_norm": True, "window": None}, name)
        fields = ("n_heads", "n_kv_heads", "head_dim", "rope", "rope_theta", "rope_dim", "gate")
        yield from uniform_needs(model, "attention", fields, name)
        yield from scale_needs(model, "attention", lambda spec: spec.head_dim, name)
        yield from spec_needs(model, "gdn", {"use_conv": True, "use_gate": True, "allow_neg_eigval": False}, name)
        shape = ("n_k_heads", "n_v_heads", "head_k_dim", "head_v_dim", "d_conv")
        yield from uniform_needs(model, "gdn", shape, name)
        yield from spec_needs(model, "mlp", {"activation": "swiglu"}, name)

    def config(self, model: ModelConfig, vocab: int) -> dict[str, Any]:
        attention, gdn = the_spec(model, "attention"), the_spec(model, "gdn")
        rotated = attention.rope_dim if attention.rope else 0
        third = rotated // 2 // 3
        config = {
            "vocab_size": vocab,
            "hidden_size": model.d_model,
            "intermediate_size": the_spec(model, "mlp").d_ff,
            "num_hidden_layers": len(model.layers),
            "layer_types": [_TYPES[layer.kind] for layer in model.layers],
            "num_attention_heads": attention.n_heads,
            "num_key_value_heads": attention.n_kv_heads,
            "head_dim": attention.head_dim,
            "attention_bias": not attention.gate,
            "hidden_act": "silu",
            "rms_norm_eps": model.norm_eps,
            "tie_word_embeddings": model.tie_embeddings,
            "rope_theta": attention.rope_theta,
            "partial_rotary_factor": rotated / attention.head_dim,
            # Of text the three positions are equal, so that the split changes nothing.
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": attention.rope_theta,
                "partial_rotary_factor": rotated / attention.head_dim,
                "mrope_section": [rotated // 2 - 2 * third, third, third],
                "mrope_interleaved": True,
            },
        }
        if gdn:
            config |= {theirs: getattr(gdn, ours) for theirs, ours in _GDN.items()}
        return config

    def links(self, model: ModelConfig) -> Iterable[Link]:
        yield same("embedding.weight", "model.embed_tokens.weight")
        yield _norm("norm.weight", "model.norm.weight")
        if not model.tie_embeddings:
            yield same("lm_head.weight", "lm_head.weight")
        for i, layer in enumerate(model.layers):
            ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
            yield _norm(f"{ours}mixer_norm.weight", f"{theirs}input_layernorm.weight")
            mixer = _attention if layer.kind == "attention" else _gdn
            yield from mixer(f"{ours}mixer.", theirs, layer.params)
            yield _norm(f"{ours}ffn_norm.weight", f"{theirs}post_attention_layernorm.weight")
            yield from all_same(DENSE, f"{ours}ffn.", f"{theirs}mlp.")

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        letters = {"full_attention": "T:mlp", "linear_attention": "G:mlp"}
        share, types = config["partial_rotary_factor"], config["layer_types"]
        return {
            "d_model": config["hidden_size"],
            "pattern": [letters[kind] for kind in types],
            "norm_eps": config["rms_norm_eps"],
            "tie_embeddings": config["tie_word_embeddings"],
            "attention": {
                "n_heads": config["num_attention_heads"],
                "n_kv_heads": config["num_key_value_heads"],
                "head_dim": config["head_dim"],
                "rope": share > 0,
                "rope_theta": config["rope_theta"],
                "rope_fraction": share or 1.0,
                "qk_norm": True,
                "gate": not config["attention_bias"],
            },
            "gdn": {ours: config[theirs] for theirs, ours in _GDN.items()} if "linear_attention" in types else {},
            "mlp": {"d_ff": config["intermediate_size"], "activation": "swiglu"},
        }


_TYPES = {"attention": "full_attention", "gdn": "linear_attention"}
_GDN = {
    "linear_num_key_heads": "n_k_heads",
    "linear_num_value_heads": "n_v_heads",
    "linear_key_head_dim": "head_k_dim",
    "linear_value_head_dim": "head_v_dim",
    "linear_conv_kernel_dim": "d_conv",
}


def _norm(ours: str, theirs: str) -> Link:
    return changed(ours, theirs, lambda weight: weight - 1, lambda weight: weight + 1)


def _gdn(ours: str, layer: str, spec: Any) -> Iterator[Link]:
    theirs = f"{layer}linear_attn."
    yield split([f"{ours}{one}_proj.weight" for one in "qkv"], f"{theirs}in_proj_qkv.weight", spec.qkv)
    for mine, name in (("g", "in_proj_z"), ("b", "in_proj_b"), ("a", "in_proj_a"), ("o", "out_proj")):
        yield same(f"{ours}{mine}_proj.weight", f"{theirs}{name}.weight")
    yield same(f"{ours}o_norm.weight", f"{theirs}norm.weight")
    yield from all_same(("conv1d.weight", "A_log", "dt_bias"), ours, theirs)


def _attention(ours: str, layer: str, spec: Any) -> Iterator[Link]:
    theirs, heads, width = f"{layer}self_attn.", spec.n_heads, spec.head_dim
    yield from all_same([f"{one}_proj.weight" for one in "kvo"], ours, theirs)
    yield from (_norm(f"{ours}{one}_norm.weight", f"{theirs}{one}_norm.weight") for one in "qk")
    queries = [f"{ours}q_proj.weight"] + ([f"{ours}g_proj.weight"] if spec.gate else [])

    def give(tensors: Tensors) -> Tensors:
        q = tensors[0].unflatten(0, (heads, width))
        gate = tensors[1].unflatten(0, (heads, width)) if spec.gate else torch.zeros_like(q)
        return [torch.cat((q, gate), 1).flatten(0, 1)]

    def take(tensors: Tensors) -> Tensors:
        parts = tensors[0].unflatten(0, (heads, 2, width)).unbind(1)
        if not spec.gate and bool(parts[1].any()):
            raise ValueError(f"{theirs}q_proj: the rows of a gate that is open are not 0")
        return [part.flatten(0, 1).contiguous() for part in parts[: len(queries)]]

    yield Link(tuple(queries), (f"{theirs}q_proj.weight",), give, take)
    if not spec.gate:
        rows = torch.cat((torch.zeros(heads, width), torch.full((heads, width), _OPEN)), 1).flatten()
        meaning = "a bias has no counterpart here"
        yield constant(f"{theirs}q_proj.bias", rows.clone, meaning)
        sizes = {"k": spec.n_kv_heads * width, "v": spec.n_kv_heads * width, "o": spec.d_model}
        for one, size in sizes.items():
            yield constant(f"{theirs}{one}_proj.bias", partial(torch.zeros, size), meaning)
