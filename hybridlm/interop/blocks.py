"""Links and fields that several architectures share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hybridlm.config.model import ModelConfig
from hybridlm.interop.architecture import Need, spec_needs, the_spec, uniform_needs
from hybridlm.interop.links import Link, copied, same, stacked

MAMBA2 = ("in_proj.weight", "conv1d.weight", "conv1d.bias", "dt_bias", "A_log", "D", "norm.weight", "out_proj.weight")
MAMBA1 = (
    *("in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight", "dt_proj.bias"),
    *("A_log", "D", "out_proj.weight"),
)
DENSE = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


def edges(
    model: ModelConfig, embedding: str = "model.embed_tokens", norm: str = "model.norm", *, ties: bool = True
) -> Iterator[Link]:
    """Embedding, last norm and head. ties: False where transformers reads a head of its own, whatever the configuration
    says: a tied one is then written twice."""
    yield same("norm.weight", f"{norm}.weight")
    if model.tie_embeddings and not ties:
        yield copied("embedding.weight", (f"{embedding}.weight", "lm_head.weight"))
        return
    yield same("embedding.weight", f"{embedding}.weight")
    if not model.tie_embeddings:
        yield same("lm_head.weight", "lm_head.weight")


def all_same(names: Sequence[str], ours: str, theirs: str) -> Iterator[Link]:
    """Tensors of the same names in two modules, which end with a dot."""
    yield from (same(ours + name, theirs + name) for name in names)


def attention_names(qk_norm: bool) -> list[str]:
    norms = ["q_norm.weight", "k_norm.weight"] if qk_norm else []
    return [f"{one}_proj.weight" for one in "qkvo"] + norms


def mla_names(q_lora_rank: int | None) -> list[str]:
    queries = (
        ["q_proj.weight"] if q_lora_rank is None else ["q_a_proj.weight", "q_a_layernorm.weight", "q_b_proj.weight"]
    )
    return [*queries, *(f"{name}.weight" for name in ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"))]


def sigmoid_mixture(ours: str, theirs: str, moe: Any) -> Iterator[Link]:
    """DeepSeek-V3's experts, one by one on disk, their router, and the shared ones."""
    yield same(f"{ours}gate.weight", f"{theirs}gate.weight")
    yield same(f"{ours}gate.e_score_correction_bias", f"{theirs}gate.e_score_correction_bias")
    experts = [f"{theirs}experts.{e}." for e in range(moe.n_experts)]
    if moe.activation == "swiglu":
        pairs = [f"{expert}{name}_proj.weight" for expert in experts for name in ("gate", "up")]
        yield gate_and_up(f"{ours}experts.gate_up_proj", pairs)
    else:
        yield stacked(f"{ours}experts.up_proj", [f"{expert}up_proj.weight" for expert in experts])
    yield stacked(f"{ours}experts.down_proj", [f"{expert}down_proj.weight" for expert in experts])
    names = DENSE if moe.activation == "swiglu" else DENSE[1:]
    yield from all_same(names, f"{ours}shared_experts.", f"{theirs}shared_experts.")


def gate_and_up(ours: str, theirs: Sequence[str]) -> Link:
    """(E, [gate, up], D) of ours, and for each expert its gate and its up projection."""
    import torch

    return Link(
        (ours,),
        tuple(theirs),
        lambda tensors: [part for expert in tensors[0] for part in expert.chunk(2)],
        lambda tensors: [torch.stack([torch.cat(list(tensors[i : i + 2])) for i in range(0, len(tensors), 2)])],
    )


# Granite's and Bamba's names, and ours.
_MAMBA2_FIELDS = {
    "mamba_n_heads": "n_heads",
    "mamba_d_head": "head_dim",
    "mamba_d_state": "d_state",
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "d_conv",
}


def mamba2_needs(model: ModelConfig, name: str, *, expand: bool = True) -> Iterator[Need]:
    """One shape of Mamba-2, gate before norm, steps without limits. expand: d_inner is a whole multiple of d_model."""
    yield from spec_needs(model, "mamba2", {"dt_limit": (0.0, float("inf")), "norm_before_gate": False}, name)
    yield from uniform_needs(model, "mamba2", _MAMBA2_FIELDS.values(), name)
    mamba = the_spec(model, "mamba2")
    if expand and mamba and mamba.d_inner % model.d_model:
        reason = f"{name} has a whole multiple of d_model inner channels"
        yield Need("model.mamba2.expand", mamba.d_inner / model.d_model, reason, ("model.mamba2.expand=2",))


def mamba2_fields(model: ModelConfig) -> dict[str, Any]:
    """Of config.json; nothing where no layer is of Mamba-2."""
    mamba = the_spec(model, "mamba2")
    if mamba is None:
        return {}
    fields = {theirs: getattr(mamba, ours) for theirs, ours in _MAMBA2_FIELDS.items()}
    return fields | {"mamba_expand": mamba.d_inner // model.d_model, "mamba_chunk_size": 256}


def mamba2_section(config: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``mamba2_fields``."""
    section = {ours: config[theirs] for theirs, ours in _MAMBA2_FIELDS.items()}
    return section | {"expand": config["mamba_expand"]}


def scale_need(attention: Any, name: str) -> Iterator[Need]:
    """The softmax scale of attention, if there is any, is that of its heads."""
    if attention and attention.scale != attention.head_dim**-0.5:
        reason = f"{name} has head_dim ** -0.5"
        yield Need("model.attention.scale", attention.scale, reason, ("model.attention.scale=null",))
