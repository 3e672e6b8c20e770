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
from hybridlm.interop.blocks import MAMBA1, MAMBA2, all_same, edges
from hybridlm.interop.links import Link, same


class Mamba(Architecture):
    """Mamba-1 layers without FFN."""

    name: ClassVar[str] = "MambaForCausalLM"
    model_type: ClassVar[str] = "mamba"
    readers: ClassVar[tuple[str, ...]] = ("vLLM",)
    kind: ClassVar[str] = "mamba1"
    tensors: ClassVar[tuple[str, ...]] = MAMBA1
    uniform: ClassVar[tuple[str, ...]] = ("d_inner", "d_state", "d_conv", "dt_rank")
    legal: ClassVar[Mapping[str, object]] = {"bias": False}

    def needs(self, model: ModelConfig) -> Iterator[Need]:
        yield from plain_needs(model, self.name)
        yield from layers_needs(model, self.name, {self.kind: "none"})
        yield from spec_needs(model, self.kind, self.legal, self.name)
        yield from uniform_needs(model, self.kind, self.uniform, self.name)
        if (spec := the_spec(model, self.kind)) and spec.d_inner % model.d_model:
            reason = f"{self.name} has a whole multiple of d_model inner channels"
            path = f"model.{self.kind}.expand"
            yield Need(path, spec.d_inner / model.d_model, reason, (f"{path}=2",))

    def config(self, model: ModelConfig, vocab: int) -> dict[str, Any]:
        spec = the_spec(model, self.kind)
        return {
            "vocab_size": vocab,
            "hidden_size": model.d_model,
            "num_hidden_layers": len(model.layers),
            "layer_norm_epsilon": model.norm_eps,
            "expand": spec.d_inner // model.d_model,
            "state_size": spec.d_state,
            "conv_kernel": spec.d_conv,
            "use_bias": False,
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
        for i in range(len(model.layers)):
            ours, theirs = f"blocks.{i}.", f"backbone.layers.{i}."
            yield same(f"{ours}mixer_norm.weight", f"{theirs}norm.weight")
            yield from all_same(self.tensors, f"{ours}mixer.", f"{theirs}mixer.")

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        layers = config["num_hidden_layers"]
        shared = {"d_state": config["state_size"], "d_conv": config["conv_kernel"], "expand": config["expand"]}
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
        return {"dt_rank": config["time_step_rank"]}


class Mamba2(Mamba):
    """Mamba-2 layers without FFN."""

    name: ClassVar[str] = "Mamba2ForCausalLM"
    model_type: ClassVar[str] = "mamba2"
    kind: ClassVar[str] = "mamba2"
    tensors: ClassVar[tuple[str, ...]] = MAMBA2
    uniform: ClassVar[tuple[str, ...]] = ("n_heads", "head_dim", "d_state", "n_groups", "d_conv", "dt_limit")
    legal: ClassVar[Mapping[str, object]] = {"norm_before_gate": False, "dt_limit": (0.0, float("inf"))}

    def own_config(self, spec: Any) -> dict[str, Any]:
        return {"num_heads": spec.n_heads, "head_dim": spec.head_dim, "n_groups": spec.n_groups, "chunk_size": 256}

    def own_fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"n_groups": config["n_groups"], "head_dim": config["head_dim"]}
