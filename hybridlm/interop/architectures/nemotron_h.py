"""NemotronH: Mamba-2 and attention without positions, with FFNs without a gate, in any order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

from hybridlm.config.ffns import FFN_KINDS
from hybridlm.config.model import ModelConfig
from hybridlm.errors import UserError
from hybridlm.interop.architecture import (
    Architecture,
    Need,
    fit_needs,
    layers_needs,
    plain_needs,
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
    mamba2_needs,
    sigmoid_mixture,
    sigmoid_needs,
)
from hybridlm.interop.links import Link, same

_LETTERS = {"mamba2": "M", "attention": "*", "mlp": "-", "moe": "E"}
_EXPERTS = {
    "n_routed_experts": "n_experts",
    "num_experts_per_tok": "top_k",
    "moe_intermediate_size": "d_expert",
    "moe_shared_expert_intermediate_size": "d_shared",
    "routed_scaling_factor": "routed_scaling_factor",
    "norm_topk_prob": "norm_topk_prob",
    "n_group": "n_expert_groups",
    "topk_group": "topk_groups",
}


class NemotronH(Architecture):
    """Each mixer and each FFN is a layer of its own."""

    name: ClassVar[str] = "NemotronHForCausalLM"
    model_type: ClassVar[str] = "nemotron_h"
    ignored: ClassVar[frozenset[str]] = frozenset({"expand", "mtp_layers_block_type"})
    readers: ClassVar[tuple[str, ...]] = ("vLLM",)

    def needs(self, model: ModelConfig) -> Iterator[Need]:
        name = self.name
        yield from plain_needs(model, name)
        yield from layers_needs(model, name, dict.fromkeys(("mamba2", "attention"), FFN_KINDS), some="attention")
        yield from spec_needs(
            model, "attention", {"qk_norm": False, "gate": False, "rope": False, "window": None}, name
        )
        yield from uniform_needs(model, "attention", ("n_heads", "n_kv_heads", "head_dim"), name)
        yield from scale_needs(model, "attention", lambda spec: spec.head_dim, name)
        yield from mamba2_needs(model, name, expand=False)
        yield from spec_needs(model, "mlp", {"activation": "relu2"}, name)
        yield from sigmoid_needs(model, "relu2", name)
        reason, remedy = f"{name} has a shared expert", ("n_shared_experts=1",)
        yield from fit_needs(model, "moe", "d_shared", lambda spec: spec.d_shared, reason, remedy)

    def config(self, model: ModelConfig, vocab: int) -> dict[str, Any]:
        attention, mamba = the_spec(model, "attention"), the_spec(model, "mamba2")
        mlp, moe = the_spec(model, "mlp"), the_spec(model, "moe")
        config = {
            "vocab_size": vocab,
            "hidden_size": model.d_model,
            "hybrid_override_pattern": "".join(_LETTERS[kind] for kind in _entries(model)),
            "num_attention_heads": attention.n_heads,
            "num_key_value_heads": attention.n_kv_heads,
            "head_dim": attention.head_dim,
            "attention_bias": False,
            "layer_norm_epsilon": model.norm_eps,
            "tie_word_embeddings": model.tie_embeddings,
            "mlp_hidden_act": "relu2",
            "mamba_hidden_act": "silu",
            "mlp_bias": False,
            "use_bias": False,
            "use_conv_bias": True,
            "residual_in_fp32": False,
            # transformers clamps step sizes from below in its parallel form alone.
            "time_step_min": 1e-9,
        }
        if mamba:
            config |= {
                "mamba_num_heads": mamba.n_heads,
                "mamba_head_dim": mamba.head_dim,
                "ssm_state_size": mamba.d_state,
                "n_groups": mamba.n_groups,
                "conv_kernel": mamba.d_conv,
                "expand": max(1, mamba.d_inner // model.d_model),
                "chunk_size": 128,
            }
        if mlp:
            config["intermediate_size"] = mlp.d_ff
        if moe:  # the keys' presence makes llama.cpp take the model for a mixture
            config |= {theirs: getattr(moe, ours) for theirs, ours in _EXPERTS.items()} | {"n_shared_experts": 1}
        return config

    def links(self, model: ModelConfig) -> Iterable[Link]:
        yield from edges(model, "backbone.embeddings", "backbone.norm_f", ties=False)
        j = 0
        for i, layer in enumerate(model.layers):
            ours, theirs = f"blocks.{i}.", f"backbone.layers.{j}."
            yield same(f"{ours}mixer_norm.weight", f"{theirs}norm.weight")
            names = MAMBA2 if layer.kind == "mamba2" else attention_names(qk_norm=False)
            yield from all_same(names, f"{ours}mixer.", f"{theirs}mixer.")
            j += 1
            if layer.ffn_kind == "none":
                continue
            theirs = f"backbone.layers.{j}."
            yield same(f"{ours}ffn_norm.weight", f"{theirs}norm.weight")
            if layer.ffn_kind == "moe":
                yield from sigmoid_mixture(f"{ours}ffn.", f"{theirs}mixer.", layer.ffn)
            else:
                yield from all_same(DENSE[1:], f"{ours}ffn.", f"{theirs}mixer.")
            j += 1

    def layer_ends(self, model: ModelConfig) -> list[int]:
        ends, j = [], -1
        for layer in model.layers:
            j += 1 if layer.ffn_kind == "none" else 2
            ends.append(j)
        return ends

    def normal(self, fields: dict[str, Any]) -> dict[str, Any]:
        letters = {"linear_attention": "M", "full_attention": "*", "mlp": "-", "moe": "E"}
        letters |= {"mamba": "M", "attention": "*"}
        if (names := fields.pop("layers_block_type", None)) and "hybrid_override_pattern" not in fields:
            fields["hybrid_override_pattern"] = "".join(letters[name] for name in names)
        if "E" not in fields["hybrid_override_pattern"]:  # fields of experts that no layer has
            fields = {key: value for key, value in fields.items() if key not in _EXPERTS}
        if "-" not in fields["hybrid_override_pattern"]:
            fields.pop("intermediate_size", None)
        return fields

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        kinds = {letter: kind for kind, letter in _LETTERS.items()}
        items: list[str] = []
        for place, letter in enumerate(config["hybrid_override_pattern"]):
            kind = kinds[letter]
            if kind in ("mamba2", "attention"):
                items.append("M2:none" if kind == "mamba2" else "T:none")
            elif not items or not items[-1].endswith(":none"):
                raise UserError(f"hybrid_override_pattern: an FFN at {place} without a mixer before it")
            else:
                items[-1] = items[-1].replace("none", kind)
        section: dict[str, Any] = {
            "d_model": config["hidden_size"],
            "pattern": items,
            "norm_eps": config["layer_norm_epsilon"],
            "tie_embeddings": config["tie_word_embeddings"],
            "attention": {
                "n_heads": config["num_attention_heads"],
                "n_kv_heads": config["num_key_value_heads"],
                "head_dim": config["head_dim"],
                "rope": False,
            },
            "mlp": {"d_ff": config.get("intermediate_size"), "activation": "relu2"},
        }
        if "M" in config["hybrid_override_pattern"]:
            heads, width = config["mamba_num_heads"], config["mamba_head_dim"]
            section["mamba2"] = {
                "n_heads": heads,
                "head_dim": width,
                "expand": heads * width / config["hidden_size"],
                "d_state": config["ssm_state_size"],
                "n_groups": config["n_groups"],
                "d_conv": config["conv_kernel"],
            }
        if "E" in config["hybrid_override_pattern"]:
            experts = {ours: config[theirs] for theirs, ours in _EXPERTS.items()}
            section["moe"] = experts | {"n_shared_experts": 1, "activation": "relu2", "router": "sigmoid"}
        return section


def _entries(model: ModelConfig) -> Iterator[str]:
    for layer in model.layers:
        yield layer.kind
        if layer.ffn_kind != "none":
            yield layer.ffn_kind
