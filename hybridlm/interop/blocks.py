"""Links and fields that several architectures share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hybridlm.config.model import ModelConfig
from hybridlm.interop.architecture import Need, fit_needs, scale_needs, spec_needs, the_spec, uniform_needs
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
    yield from each_expert(ours, theirs, moe)
    names = DENSE if moe.activation == "swiglu" else DENSE[1:]
    yield from all_same(names, f"{ours}shared_experts.", f"{theirs}shared_experts.")


def each_expert(ours: str, theirs: str, moe: Any) -> Iterator[Link]:
    """The routed experts, one by one on disk."""
    experts = [f"{theirs}experts.{e}." for e in range(moe.n_experts)]
    if moe.activation == "swiglu":
        pairs = [f"{expert}{name}_proj.weight" for expert in experts for name in ("gate", "up")]
        yield gate_and_up(f"{ours}experts.gate_up_proj", pairs)
    else:
        yield stacked(f"{ours}experts.up_proj", [f"{expert}up_proj.weight" for expert in experts])
    yield stacked(f"{ours}experts.down_proj", [f"{expert}down_proj.weight" for expert in experts])


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
    yield from uniform_needs(model, "mamba2", ("head_dim", "d_inner", "d_state", "n_groups", "d_conv"), name)
    if expand:
        yield from expand_needs(model, "mamba2", name)


def expand_needs(model: ModelConfig, kind: str, name: str) -> Iterator[Need]:
    """The inner channels of a Mamba are a whole multiple of d_model."""
    reason, remedy = f"{name} has a whole multiple of d_model", ("expand=2", "n_heads=null")[: 1 + (kind == "mamba2")]
    yield from fit_needs(model, kind, "d_inner", lambda spec: not spec.d_inner % model.d_model, reason, remedy)


def mamba2_fields(model: ModelConfig) -> dict[str, Any]:
    """Of config.json. transformers checks the sizes also where no layer is of Mamba-2."""
    mamba = the_spec(model, "mamba2")
    if mamba is None:
        return {"mamba_n_heads": 1, "mamba_d_head": 2 * model.d_model, "mamba_expand": 2}
    fields = {theirs: getattr(mamba, ours) for theirs, ours in _MAMBA2_FIELDS.items()}
    return fields | {"mamba_expand": mamba.d_inner // model.d_model, "mamba_chunk_size": 256}


def mamba2_section(config: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``mamba2_fields``."""
    section = {ours: config[theirs] for theirs, ours in _MAMBA2_FIELDS.items()}
    return section | {"expand": config["mamba_expand"]}


def head_count_needs(model: ModelConfig, name: str) -> Iterator[Need]:
    """The number of heads of attention divides d_model, also where they have a width of their own."""
    if spec := the_spec(model, "attention"):
        heads = next(count for count in range(spec.n_heads, 0, -1) if not model.d_model % count)
        remedy = (f"n_heads={heads}", "n_kv_heads=null")
        reason = f"{name} has a number of heads that divides d_model"
        yield from fit_needs(model, "attention", "n_heads", lambda one: not model.d_model % one.n_heads, reason, remedy)


def latent_scale_needs(model: ModelConfig, name: str) -> Iterator[Need]:
    """The softmax scale of latent attention is that of whole queries, rotated part included."""
    yield from scale_needs(model, "mla", lambda spec: spec.qk_nope_head_dim + spec.qk_rope_head_dim, name)


def shared_expert_needs(model: ModelConfig, name: str) -> Iterator[Need]:
    """A mixture has shared experts, as wide as the others."""
    reason, remedy = (
        f"{name} has at least one shared expert, as wide as the others",
        ("n_shared_experts=1", "d_shared=null"),
    )
    yield from fit_needs(
        model, "moe", "d_shared", lambda spec: spec.d_shared and not spec.d_shared % spec.d_expert, reason, remedy
    )


def sigmoid_needs(model: ModelConfig, activation: str, name: str) -> Iterator[Need]:
    """Mixtures are as in DeepSeek-V3, with this activation."""
    yield from spec_needs(model, "moe", {"activation": activation, "router": "sigmoid", "shared_gate": False}, name)
    reason = f"{name} ranks groups of experts by the best two"
    yield from fit_needs(
        model, "moe", "n_experts", lambda spec: spec.n_experts // spec.n_expert_groups >= 2, reason, ("n_experts=2",)
    )
