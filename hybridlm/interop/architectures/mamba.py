"""Stacks of Mamba-1 or Mamba-2 alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

from hybridlm.config.model import ModelConfig
from hybridlm.interop.architecture import (
    Architecture,
    Need,
    layers_needs,
    plain_needs,
    spec_needs,
    the_spec,
    uniform_needs,
)
from hybridlm.interop.blocks import MAMBA1, MAMBA2, all_same, edges, expand_needs
from hybridlm.interop.links import Link, same


class Mamba(Architecture):
    """Mamba-1 layers without FFN."""

    name: ClassVar[str] = "MambaForCausalLM"
    model_type: ClassVar[str] = "mamba"
    readers: ClassVar[tuple[str, ...]] = ("vLLM",)
    kind: ClassVar[str] = "mamba1"
    tensors: ClassVar[tuple[str, ...]] = MAMBA1
    uniform: ClassVar[tuple[str, ...]] = ("d_inner", "d_state", "d_conv", "dt_rank", "bias")

    def needs(self, model: ModelConfig) -> Iterator[Need]:
        yield from plain_needs(model, self.name)
        yield from layers_needs(model, self.name, {self.kind: ["none"]})
        yield from uniform_needs(model, self.kind, self.uniform, self.name)

    def config(self, model: ModelConfig, vocab: int) -> dict[str, Any]:
        spec = the_spec(model, self.kind)
        return {
            "vocab_size": vocab,
            "hidden_size": model.d_model,
            "num_hidden_layers": len(model.layers),
            "layer_norm_epsilon": model.norm_eps,
            "expand": max(1, spec.d_inner // model.d_model),
            "state_size": spec.d_state,
            "conv_kernel": spec.d_conv,
            "use_bias": getattr(spec, "bias", False),
            "use_conv_bias": True,
            "hidden_act": "silu",
            "residual_in_fp32": False,
            "tie_word_embeddings": model.tie_embeddings,
            **self.own_config(spec),
        }

    def own_config(self, spec: Any) -> dict[str, Any]:
        """What differs between the two."""
        return {"time_step_rank": spec.dt_rank, "intermediate_size": spec.d_inner}

    def links(self, model: ModelConfig) -> Iterable[Link]:
        yield from edges(model, "backbone.embeddings", "backbone.norm_f")
        for i, layer in enumerate(model.layers):
            ours, theirs = f"blocks.{i}.", f"backbone.layers.{i}."
            yield same(f"{ours}mixer_norm.weight", f"{theirs}norm.weight")
            biases = ("in_proj.bias", "out_proj.bias") if getattr(layer.params, "bias", False) else ()
            yield from all_same((*self.tensors, *biases), f"{ours}mixer.", f"{theirs}mixer.")

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        layers = config["num_hidden_layers"]
        shared = {"d_state": config["state_size"], "d_conv": config["conv_kernel"]}
        return {
            "d_model": config["hidden_size"],
            "n_layers": layers,
            "pattern": f"M{self.kind[-1]}:none",
            "norm_eps": config["layer_norm_epsilon"],
            "tie_embeddings": config["tie_word_embeddings"],
            self.kind: shared | self.own_fields(config),
        }

    def own_fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The inverse of ``own_config``."""
        inner = config.get("intermediate_size", config["expand"] * config["hidden_size"])
        own = {"dt_rank": config["time_step_rank"], "bias": config["use_bias"]}
        return own | {"expand": inner / config["hidden_size"]}


class Mamba2(Mamba):
    """Mamba-2 layers without FFN."""

    name: ClassVar[str] = "Mamba2ForCausalLM"
    model_type: ClassVar[str] = "mamba2"
    kind: ClassVar[str] = "mamba2"
    tensors: ClassVar[tuple[str, ...]] = MAMBA2
    uniform: ClassVar[tuple[str, ...]] = ("head_dim", "d_inner", "d_state", "n_groups", "d_conv")

    def needs(self, model: ModelConfig) -> Iterator[Need]:
        yield from super().needs(model)
        yield from expand_needs(model, "mamba2", self.name)
        yield from spec_needs(model, "mamba2", {"norm_before_gate": False, "dt_limit": (0.0, float("inf"))}, self.name)

    def own_config(self, spec: Any) -> dict[str, Any]:
        return {"num_heads": spec.n_heads, "head_dim": spec.head_dim, "n_groups": spec.n_groups, "chunk_size": 256}

    def own_fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"n_groups": config["n_groups"], "head_dim": config["head_dim"], "expand": config["expand"]}
