"""The tensors of a GGUF file, by llama.cpp's names, from ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from hybridlm.config.layers import LayerSpec
from hybridlm.config.model import ModelConfig
from hybridlm.interop.gguf.architectures import Target
from hybridlm.interop.links import Link, Tensors, same

_LATENT = {
    "q_proj": "attn_q",
    "q_a_proj": "attn_q_a",
    "q_a_layernorm": "attn_q_a_norm",
    "q_b_proj": "attn_q_b",
    "kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "kv_a_layernorm": "attn_kv_a_norm",
    "o_proj": "attn_output",
}


def links(model: ModelConfig, target: Target) -> Iterator[Link]:
    """All tensors of a model that ``target`` needs nothing of."""
    yield same("embedding.weight", "token_embd.weight")
    yield same("norm.weight", "output_norm.weight")
    if not model.tie_embeddings:
        yield same("lm_head.weight", "output.weight")
    block = 0
    for i, layer in enumerate(model.layers):
        ours, theirs = f"blocks.{i}.", f"blk.{block}."
        yield same(f"{ours}mixer_norm.weight", f"{theirs}attn_norm.weight")
        yield from _MIXERS[layer.kind](f"{ours}mixer.", theirs, layer.params, target)
        if layer.ffn_kind != "none":
            block += target.split
            theirs, norm = f"blk.{block}.", "attn_norm" if target.split else "ffn_norm"
            yield same(f"{ours}ffn_norm.weight", f"{theirs}{norm}.weight")
            yield from _ffn(f"{ours}ffn.", theirs, layer)
        block += 1


def paired(weight: Tensor, heads: int, first: int, size: int) -> Tensor:
    """Rows of heads whose channels ``first`` to ``first + size`` are rotated in pairs (i, i + size / 2), reordered to
    be rotated in pairs (2i, 2i + 1). weight: (heads x width, D)."""
    width = weight.shape[0] // heads
    before, rotated, after = weight.unflatten(0, (heads, width)).split((first, size, width - first - size), 1)
    rotated = rotated.unflatten(1, (2, size // 2)).transpose(1, 2).flatten(1, 2)
    joined: Tensor = before.new_empty(heads, width, *weight.shape[1:])
    joined[:, :first], joined[:, first : first + size], joined[:, first + size :] = before, rotated, after
    return joined.flatten(0, 1)


def _attention(ours: str, theirs: str, spec: Any, target: Target) -> Iterator[Link]:
    for one, heads in (("q", spec.n_heads), ("k", spec.n_kv_heads)):
        pairs = partial(paired, heads=heads, first=0, size=spec.rope_dim)
        yield _made(f"{ours}{one}_proj.weight", f"{theirs}attn_{one}.weight", pairs, spec.rope and target.pairs)
        if spec.qk_norm:
            yield same(f"{ours}{one}_norm.weight", f"{theirs}attn_{one}_norm.weight")
    yield same(f"{ours}v_proj.weight", f"{theirs}attn_v.weight")
    yield same(f"{ours}o_proj.weight", f"{theirs}attn_output.weight")


def _mla(ours: str, theirs: str, spec: Any, target: Target) -> Iterator[Link]:
    rotated, heads = spec.qk_rope_head_dim, spec.n_heads
    queries = "q_proj" if spec.q_lora_rank is None else "q_b_proj"
    change: dict[str, Callable[[Tensor], Tensor]] = {
        queries: partial(paired, heads=heads, first=spec.qk_nope_head_dim, size=rotated),
        "kv_a_proj_with_mqa": partial(paired, heads=1, first=spec.kv_lora_rank, size=rotated),
    }
    left_out = ("q_a_proj", "q_a_layernorm", "q_b_proj") if queries == "q_proj" else ("q_proj",)
    for name, other in _LATENT.items():
        if name not in left_out:
            apart = name in change and not spec.rope_interleave
            yield _made(f"{ours}{name}.weight", f"{theirs}{other}.weight", change.get(name, _as_is), apart)

    def expansion(tensors: Tensors) -> Tensors:
        """The keys' part as what absorbs it into the query: (H, c, nope); the values': (H, v, c)."""
        sizes = (spec.qk_nope_head_dim, spec.v_head_dim)
        keys, values = tensors[0].unflatten(0, (heads, -1)).split(sizes, 1)
        return [keys.transpose(1, 2), values]

    yield _given((f"{ours}kv_b_proj.weight",), (f"{theirs}attn_k_b.weight", f"{theirs}attn_v_b.weight"), expansion)


def _mamba1(ours: str, theirs: str, spec: Any, target: Target) -> Iterator[Link]:
    yield from _mamba(ours, theirs)
    yield same(f"{ours}x_proj.weight", f"{theirs}ssm_x.weight")
    yield same(f"{ours}dt_proj.weight", f"{theirs}ssm_dt.weight")
    yield same(f"{ours}dt_proj.bias", f"{theirs}ssm_dt.bias")
    yield _made(f"{ours}A_log", f"{theirs}ssm_a", _decay)
    yield same(f"{ours}D", f"{theirs}ssm_d")


def _mamba2(ours: str, theirs: str, spec: Any, target: Target) -> Iterator[Link]:
    yield from _mamba(ours, theirs)
    yield same(f"{ours}dt_bias", f"{theirs}ssm_dt.bias")
    yield _made(f"{ours}A_log", f"{theirs}ssm_a", lambda tensor: _decay(tensor).unsqueeze(1))
    yield _made(f"{ours}D", f"{theirs}ssm_d", lambda tensor: tensor.unsqueeze(1))
    yield _made(f"{ours}norm.weight", f"{theirs}ssm_norm.weight", lambda tensor: tensor.view(spec.n_groups, -1))


def _mamba(ours: str, theirs: str) -> Iterator[Link]:
    yield same(f"{ours}in_proj.weight", f"{theirs}ssm_in.weight")
    yield _made(f"{ours}conv1d.weight", f"{theirs}ssm_conv1d.weight", lambda tensor: tensor.squeeze(1))
    yield same(f"{ours}conv1d.bias", f"{theirs}ssm_conv1d.bias")
    yield same(f"{ours}out_proj.weight", f"{theirs}ssm_out.weight")


_MIXERS = {"attention": _attention, "mla": _mla, "mamba1": _mamba1, "mamba2": _mamba2}


def _ffn(ours: str, theirs: str, layer: LayerSpec) -> Iterator[Link]:
    spec: Any = layer.ffn
    if layer.ffn_kind == "mlp":
        yield from _dense(ours, theirs, "", spec)
        return
    yield same(f"{ours}gate.weight", f"{theirs}ffn_gate_inp.weight")
    if spec.router == "sigmoid":
        yield same(f"{ours}gate.e_score_correction_bias", f"{theirs}exp_probs_b.bias")
    if spec.activation == "swiglu":
        both = tuple(f"{theirs}ffn_{name}_exps.weight" for name in ("gate", "up"))
        yield _given((f"{ours}experts.gate_up_proj",), both, lambda tensors: tensors[0].chunk(2, 1))
    else:
        yield same(f"{ours}experts.up_proj", f"{theirs}ffn_up_exps.weight")
    yield same(f"{ours}experts.down_proj", f"{theirs}ffn_down_exps.weight")
    if spec.shared:
        yield from _dense(f"{ours}shared_experts.", theirs, "_shexp", spec)


def _dense(ours: str, theirs: str, suffix: str, spec: Any) -> Iterator[Link]:
    for name in ("gate", "up", "down")[spec.activation != "swiglu" :]:
        yield same(f"{ours}{name}_proj.weight", f"{theirs}ffn_{name}{suffix}.weight")


def _decay(A_log: Tensor) -> Tensor:
    return -A_log.float().exp()


def _as_is(tensor: Tensor) -> Tensor:
    return tensor


def _made(ours: str, theirs: str, make: Callable[[Tensor], Tensor], needed: bool = True) -> Link:
    """One tensor from one; ``needed`` False: the same."""
    return _given((ours,), (theirs,), lambda tensors: [make(tensors[0])]) if needed else same(ours, theirs)


def _given(ours: Sequence[str], theirs: Sequence[str], give: Callable[[Tensors], Tensors]) -> Link:
    """A link that is followed in one direction only: GGUF files are not imported."""

    def take(tensors: Tensors) -> Tensors:
        raise ValueError("GGUF files are not read")

    return Link(tuple(ours), tuple(theirs), give, take)
