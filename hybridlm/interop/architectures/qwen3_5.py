"""Qwen3.5 (text) and Qwen3-Next: gated DeltaNet and gated attention with QK-norm, and what follows each: a SwiGLU, or
in Qwen3-Next also a mixture with a gated shared expert."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import torch

from hybridlm.config.ffns.moe import MoESpec
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
from hybridlm.interop.blocks import DENSE, all_same, each_expert
from hybridlm.interop.links import Link, Tensors, changed, constant, same, split

_OPEN = 40.0  # a gate's logit whose sigmoid is 1 in float32


class Qwen35(Architecture):
    """Norms of blocks and heads are stored as the difference from 1. A head's rows of q_proj are its query, then its
    gate; where ours has no gate, biases hold theirs open."""

    name: ClassVar[str] = "Qwen3_5ForCausalLM"
    model_type: ClassVar[str] = "qwen3_5_text"
    readers: ClassVar[tuple[str, ...]] = ("vLLM",)
    ignored: ClassVar[frozenset[str]] = frozenset({"full_attention_interval"})
    ffns: ClassVar[tuple[str, ...]] = ("mlp",)

    def needs(self, model: ModelConfig) -> Iterator[Need]:
        name = self.name
        yield from plain_needs(model, name)
        yield from layers_needs(model, name, dict.fromkeys(("gdn", "attention"), self.ffns), some="attention")
        yield from spec_needs(model, "attention", {"qk_norm": True, "window": None}, name)
        fields = ("n_heads", "n_kv_heads", "head_dim", "rope", "rope_theta", "rope_dim", "gate")
        yield from uniform_needs(model, "attention", fields, name)
        yield from scale_needs(model, "attention", lambda spec: spec.head_dim, name)
        yield from spec_needs(model, "gdn", {"use_conv": True, "use_gate": True, "allow_neg_eigval": False}, name)
        shape = ("n_k_heads", "n_v_heads", "head_k_dim", "head_v_dim", "d_conv")
        yield from uniform_needs(model, "gdn", shape, name)
        yield from spec_needs(model, "mlp", {"activation": "swiglu"}, name)

    def config(self, model: ModelConfig, vocab: int) -> dict[str, Any]:
        attention, gdn, mlp = (the_spec(model, kind) for kind in ("attention", "gdn", "mlp"))
        rotated = attention.rope_dim if attention.rope else 0
        third = rotated // 2 // 3
        config = {
            "vocab_size": vocab,
            "hidden_size": model.d_model,
            "intermediate_size": mlp.d_ff if mlp else 0,
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
            mixer = _attention if layer.kind == "attention" else self.delta_links
            yield from mixer(f"{ours}mixer.", theirs, layer.params)
            yield _norm(f"{ours}ffn_norm.weight", f"{theirs}post_attention_layernorm.weight")
            yield from self.ffn_links(f"{ours}ffn.", f"{theirs}mlp.", layer.ffn)

    def delta_links(self, ours: str, layer: str, spec: Any) -> Iterator[Link]:
        """Of a layer of gated DeltaNet."""
        theirs = f"{layer}linear_attn."
        yield split([f"{ours}{one}_proj.weight" for one in "qkv"], f"{theirs}in_proj_qkv.weight", spec.qkv)
        for mine, name in (("g", "in_proj_z"), ("b", "in_proj_b"), ("a", "in_proj_a")):
            yield same(f"{ours}{mine}_proj.weight", f"{theirs}{name}.weight")
        yield from _delta_core(ours, theirs)

    def ffn_links(self, ours: str, theirs: str, ffn: Any) -> Iterator[Link]:
        """Of what follows a mixer."""
        return all_same(DENSE, ours, theirs)

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


class Qwen3Next(Qwen35):
    """The rows of a key head lie together: its query, its key, and the values, gates and step sizes of its value
    heads."""

    name: ClassVar[str] = "Qwen3NextForCausalLM"
    model_type: ClassVar[str] = "qwen3_next"
    ffns: ClassVar[tuple[str, ...]] = ("mlp", "moe")

    def needs(self, model: ModelConfig) -> Iterator[Need]:
        yield from super().needs(model)
        mixture = {"activation": "swiglu", "router": "softmax", "routed_scaling_factor": 1.0, "shared_gate": True}
        yield from spec_needs(model, "moe", mixture, self.name)

    def config(self, model: ModelConfig, vocab: int) -> dict[str, Any]:
        config, moe = super().config(model, vocab), the_spec(model, "moe")
        rope = config["rope_parameters"]
        config["rope_parameters"] = {key: value for key, value in rope.items() if not key.startswith("mrope")}
        dense = [i for i, layer in enumerate(model.layers) if layer.ffn_kind == "mlp"]
        config |= {"decoder_sparse_step": 1, "mlp_only_layers": dense, "num_experts": 0}
        if moe:
            config |= {theirs: getattr(moe, ours) for theirs, ours in _MOE.items()}
        return config | ({} if dense else {"intermediate_size": moe.d_expert})

    def delta_links(self, ours: str, layer: str, spec: Any) -> Iterator[Link]:
        theirs, each = f"{layer}linear_attn.", spec.n_v_heads // spec.n_k_heads
        values = each * spec.head_v_dim
        widths = {"q": spec.head_k_dim, "k": spec.head_k_dim, "v": values, "g": values}
        yield _by_head(ours, widths, f"{theirs}in_proj_qkvz.weight", spec.n_k_heads)
        yield _by_head(ours, {"b": each, "a": each}, f"{theirs}in_proj_ba.weight", spec.n_k_heads)
        yield from _delta_core(ours, theirs)

    def ffn_links(self, ours: str, theirs: str, ffn: Any) -> Iterator[Link]:
        if not isinstance(ffn, MoESpec):
            yield from super().ffn_links(ours, theirs, ffn)
            return
        yield same(f"{ours}gate.weight", f"{theirs}gate.weight")
        yield same(f"{ours}shared_gate.weight", f"{theirs}shared_expert_gate.weight")
        yield from each_expert(ours, theirs, ffn)
        yield from all_same(DENSE, f"{ours}shared_experts.", f"{theirs}shared_expert.")

    def normal(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Without the fields of a kind of FFN that no layer has."""
        layers, step = fields["num_hidden_layers"], fields.get("decoder_sparse_step", 1)
        named, experts = fields.get("mlp_only_layers") or [], fields.get("num_experts", 0)
        dense = [i for i in range(layers) if i in named or not experts or (i + 1) % step]
        fields |= {"mlp_only_layers": dense, "decoder_sparse_step": 1}
        if len(dense) == layers:
            fields = {key: value for key, value in fields.items() if key not in _MOE} | {"num_experts": 0}
        elif not dense:
            fields["intermediate_size"] = fields["moe_intermediate_size"]
        return fields

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        section, dense = super().read(config), set(config["mlp_only_layers"])
        mixed = [i not in dense for i in range(len(section["pattern"]))]
        pairs = zip(section["pattern"], mixed, strict=True)
        section["pattern"] = [item.replace("mlp", "moe") if moe else item for item, moe in pairs]
        if any(mixed):
            moe = {ours: config[theirs] for theirs, ours in _MOE.items()}
            fixed = {"activation": "swiglu", "router": "softmax", "n_shared_experts": 1, "shared_gate": True}
            section["moe"] = moe | fixed
        return section


_MOE = {
    "num_experts": "n_experts",
    "num_experts_per_tok": "top_k",
    "moe_intermediate_size": "d_expert",
    "shared_expert_intermediate_size": "d_shared",
    "norm_topk_prob": "norm_topk_prob",
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


def _by_head(ours: str, widths: Mapping[str, int], theirs: str, heads: int) -> Link:
    """Projections with so many rows for each key head, which theirs has side by side."""

    def give(tensors: Tensors) -> Tensors:
        parts = [tensor.unflatten(0, (heads, width)) for tensor, width in zip(tensors, widths.values(), strict=True)]
        return [torch.cat(parts, 1).flatten(0, 1)]

    def take(tensors: Tensors) -> Tensors:
        parts = tensors[0].unflatten(0, (heads, sum(widths.values()))).split(list(widths.values()), 1)
        return [part.flatten(0, 1).contiguous() for part in parts]

    return Link(tuple(f"{ours}{one}_proj.weight" for one in widths), (theirs,), give, take)


def _delta_core(ours: str, theirs: str) -> Iterator[Link]:
    yield same(f"{ours}o_proj.weight", f"{theirs}out_proj.weight")
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
