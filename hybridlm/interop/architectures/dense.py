"""Stacks of attention with a dense FFN each: Llama, Qwen3 and Arcee."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

from hybridlm.config.model import ModelConfig
from hybridlm.interop.architecture import (
    Architecture,
    Need,
    layers_needs,
    plain_needs,
    rotary_needs,
    scale_needs,
    spec_needs,
    the_spec,
    uniform_needs,
)
from hybridlm.interop.blocks import DENSE, all_same, attention_names, edges, head_count_needs
from hybridlm.interop.links import Link, same


class Llama(Architecture):
    """Rotary attention and SwiGLU."""

    name: ClassVar[str] = "LlamaForCausalLM"
    model_type: ClassVar[str] = "llama"
    readers: ClassVar[tuple[str, ...]] = ("vLLM",)
    activation: ClassVar[str] = "swiglu"
    qk_norm: ClassVar[bool] = False
    windows: ClassVar[bool] = False
    divides: ClassVar[bool] = True  # transformers insists on a number of heads that divides d_model

    def needs(self, model: ModelConfig) -> Iterator[Need]:
        name = self.name
        yield from plain_needs(model, name)
        yield from layers_needs(model, name, {"attention": ["mlp"]})
        legal: dict[str, object] = {"qk_norm": self.qk_norm, "rope": True, "gate": False}
        if not self.windows:
            legal["window"] = None
        yield from spec_needs(model, "attention", legal, name)
        yield from uniform_needs(model, "attention", ("n_heads", "n_kv_heads", "head_dim", "rope_theta"), name)
        windows = {spec.window for _, spec in self._sections(model) if spec.window is not None}
        if self.windows and len(windows) > 1:
            yield Need("windows", sorted(windows), f"{name} has one window")
        yield from scale_needs(model, "attention", lambda spec: spec.head_dim, name)
        yield from rotary_needs(model, name, 1.0)
        if self.divides:
            yield from head_count_needs(model, name)
        yield from spec_needs(model, "mlp", {"activation": self.activation}, name)

    def _sections(self, model: ModelConfig) -> list[tuple[str, Any]]:
        return [(layer.letter, layer.params) for layer in model.layers if layer.kind == "attention"]

    def config(self, model: ModelConfig, vocab: int) -> dict[str, Any]:
        attention, mlp = the_spec(model, "attention"), the_spec(model, "mlp")
        return {
            "vocab_size": vocab,
            "hidden_size": model.d_model,
            "intermediate_size": mlp.d_ff,
            "num_hidden_layers": len(model.layers),
            "num_attention_heads": attention.n_heads,
            "num_key_value_heads": attention.n_kv_heads,
            "head_dim": attention.head_dim,
            "hidden_act": "silu" if self.activation == "swiglu" else "relu2",
            "rms_norm_eps": model.norm_eps,
            "rope_theta": attention.rope_theta,
            "tie_word_embeddings": model.tie_embeddings,
            "attention_bias": False,
            "mlp_bias": False,
        }

    def links(self, model: ModelConfig) -> Iterable[Link]:
        yield from edges(model)
        dense = DENSE if self.activation == "swiglu" else DENSE[1:]
        for i in range(len(model.layers)):
            ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
            yield same(f"{ours}mixer_norm.weight", f"{theirs}input_layernorm.weight")
            yield from all_same(attention_names(self.qk_norm), f"{ours}mixer.", f"{theirs}self_attn.")
            yield same(f"{ours}ffn_norm.weight", f"{theirs}post_attention_layernorm.weight")
            yield from all_same(dense, f"{ours}ffn.", f"{theirs}mlp.")

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "d_model": config["hidden_size"],
            "n_layers": config["num_hidden_layers"],
            "norm_eps": config["rms_norm_eps"],
            "tie_embeddings": config["tie_word_embeddings"],
            "attention": {
                "n_heads": config["num_attention_heads"],
                "n_kv_heads": config["num_key_value_heads"],
                "head_dim": config["head_dim"],
                "rope": True,
                "rope_theta": config["rope_theta"],
                "qk_norm": self.qk_norm,
            },
            "mlp": {"d_ff": config["intermediate_size"], "activation": self.activation},
        }


class Arcee(Llama):
    """Rotary attention and squared ReLU."""

    name: ClassVar[str] = "ArceeForCausalLM"
    model_type: ClassVar[str] = "arcee"
    activation: ClassVar[str] = "relu2"


class Qwen3(Llama):
    """Rotary attention with QK-norm, and SwiGLU; some layers may see a sliding window."""

    name: ClassVar[str] = "Qwen3ForCausalLM"
    model_type: ClassVar[str] = "qwen3"
    qk_norm: ClassVar[bool] = True
    windows: ClassVar[bool] = True
    divides: ClassVar[bool] = False

    def config(self, model: ModelConfig, vocab: int) -> dict[str, Any]:
        windows = [layer.params.window for layer in model.layers]  # type: ignore[attr-defined]
        config = super().config(model, vocab)
        del config["mlp_bias"]
        return config | {
            "use_sliding_window": any(windows),
            "sliding_window": max((window for window in windows if window), default=None),
            "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
        }

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        section = super().read(config)
        if config["use_sliding_window"]:
            letters = {"sliding_attention": "S", "full_attention": "T"}
            section["pattern"] = [letters[kind] for kind in config["layer_types"]]
            section["variants"] = {"S": {"mixer": "attention", "window": config["sliding_window"]}}
        return section
