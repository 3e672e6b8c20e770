"""llama.cpp's architectures: which models of ours each computes exactly, and the keys of its GGUF files.

Most are an architecture of transformers too, whose constraints hold here as well, but for some that llama.cpp does not
have. What is said of llama.cpp was read in its sources (``src/models/*.cpp``) as of late 2026.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from hybridlm.config.model import ModelConfig
from hybridlm.interop.architecture import (
    Architecture,
    Need,
    pattern_text,
    sections,
    spec_needs,
    the_spec,
    uniform_needs,
)
from hybridlm.interop.architectures.deepseek import DeepseekV3
from hybridlm.interop.architectures.dense import Arcee, Llama, Qwen3
from hybridlm.interop.architectures.granite import GraniteMoeHybrid
from hybridlm.interop.architectures.mamba import Mamba, Mamba2
from hybridlm.interop.architectures.nemotron_h import NemotronH

Keys = dict[str, Any]


class _Llama(Llama):
    divides: ClassVar[bool] = False


class _Arcee(Arcee):
    divides: ClassVar[bool] = False


class _Granite(GraniteMoeHybrid):
    own_widths: ClassVar[bool] = True


_MOST_BLOCKS = 512
_SIGMOID = 2  # llama.cpp's number of that router
_LITE_LAYERS = (26, 27)  # llama.cpp takes a model of so many for DeepSeek-V2-Lite


def _nothing(model: ModelConfig) -> Iterator[Need]:
    yield from ()


@dataclass(frozen=True)
class Target:
    """An architecture of llama.cpp.

    base: the same of transformers; lifted: the fields of its needs that do not hold here, or how they begin; more:
    needs of llama.cpp alone; keys: what it reads of a file besides ``_common``, without its name before them. pairs:
    it rotates channels 2i and 2i + 1 of a head, not i and i + R / 2. split: mixers and FFNs are blocks of their own.
    """

    name: str
    base: Architecture
    keys: Callable[[ModelConfig], Keys]
    more: Callable[[ModelConfig], Iterator[Need]] = _nothing
    lifted: tuple[str, ...] = ()
    pairs: bool = True
    split: bool = False

    def needs(self, model: ModelConfig) -> Iterator[Need]:
        """What stands in the way of an exact file."""
        found = [need for need in self.base.needs(model) if not need.field.startswith(self.lifted or ("\0",))]
        for need in [*found, *self.more(model)]:
            yield replace(need, reason=need.reason.replace(self.base.name, f"llama.cpp's {self.name}"))
        if (blocks := self.blocks(model)) > _MOST_BLOCKS:
            yield Need("blocks", blocks, f"llama.cpp has at most {_MOST_BLOCKS}")

    def file_name(self, model: ModelConfig) -> str:
        """``general.architecture``."""
        return f"{self.name}_moe" if self.split and the_spec(model, "moe") else self.name

    def blocks(self, model: ModelConfig) -> int:
        return sum(2 if self.split and layer.ffn_kind != "none" else 1 for layer in model.layers)

    def all_keys(self, model: ModelConfig, vocab: int, context: int) -> Keys:
        """The keys of the architecture, with its name before them."""
        common = {
            "block_count": self.blocks(model),
            "context_length": context,
            "embedding_length": model.d_model,
            "vocab_size": vocab,
            "attention.layer_norm_rms_epsilon": model.norm_eps,
        }
        name = self.file_name(model)
        return {f"{name}.{key}": value for key, value in (common | self.keys(model)).items()}


def _attention(model: ModelConfig) -> Keys:
    attention = the_spec(model, "attention")
    keys = {
        "attention.head_count": attention.n_heads,
        "attention.head_count_kv": attention.n_kv_heads,
        "attention.key_length": attention.head_dim,
        "attention.value_length": attention.head_dim,
    }
    if attention.rope:
        keys |= {"rope.dimension_count": attention.rope_dim, "rope.freq_base": attention.rope_theta}
    return keys


def _dense(model: ModelConfig) -> Keys:
    return _attention(model) | {"feed_forward_length": the_spec(model, "mlp").d_ff}


def _ssm(mamba: Any) -> Keys:
    """Of Mamba-2; llama.cpp keeps the number of heads as the rank of the steps."""
    return {
        "ssm.conv_kernel": mamba.d_conv,
        "ssm.inner_size": mamba.d_inner,
        "ssm.state_size": mamba.d_state,
        "ssm.group_count": mamba.n_groups,
        "ssm.time_step_rank": mamba.n_heads,
    }


def _no_attention(keys: Keys) -> Keys:
    return keys | {"feed_forward_length": 0, "attention.head_count": 0}


def _mamba1(model: ModelConfig) -> Keys:
    mamba = the_spec(model, "mamba1")
    return _no_attention(
        {
            "ssm.conv_kernel": mamba.d_conv,
            "ssm.inner_size": mamba.d_inner,
            "ssm.state_size": mamba.d_state,
            "ssm.time_step_rank": mamba.dt_rank,
        }
    )


def _granite(model: ModelConfig) -> Keys:
    attention, mlp, moe = (the_spec(model, kind) for kind in ("attention", "mlp", "moe"))
    keys = _attention(model) | _ssm(the_spec(model, "mamba2"))
    keys |= {
        "attention.head_count_kv": [attention.n_kv_heads * (layer.kind == "attention") for layer in model.layers],
        "attention.scale": attention.scale,
        "embedding_scale": model.embedding_scale,
        "residual_scale": model.residual_scale,
        "logit_scale": 1 / model.logit_scale,
        "rope.scaling.finetuned": attention.rope,  # llama.cpp's switch for rotation in this architecture
        "feed_forward_length": mlp.d_ff if mlp else moe.d_expert,
    }
    if moe:
        keys |= {"expert_count": moe.n_experts, "expert_used_count": moe.top_k}
        keys |= {"expert_shared_feed_forward_length": moe.d_shared} if moe.d_shared else {}
    return keys


def _sigmoid(moe: Any) -> Keys:
    keys = {
        "expert_count": moe.n_experts,
        "expert_used_count": moe.top_k,
        "expert_feed_forward_length": moe.d_expert,
        "expert_weights_norm": moe.norm_topk_prob,
        "expert_weights_scale": moe.routed_scaling_factor,
        "expert_gating_func": _SIGMOID,
    }
    if moe.topk_groups < moe.n_expert_groups:  # llama.cpp refuses a choice of all
        keys |= {"expert_group_count": moe.n_expert_groups, "expert_group_used_count": moe.topk_groups}
    return keys


def _nemotron_h(model: ModelConfig) -> Keys:
    attention, moe = the_spec(model, "attention"), the_spec(model, "moe")
    heads, widths = [], []
    for layer in model.layers:
        heads.append(attention.n_kv_heads * (layer.kind == "attention"))
        widths.append(0)
        if layer.ffn is not None:
            heads.append(0)
            widths.append(layer.ffn.d_expert if layer.ffn_kind == "moe" else layer.ffn.d_ff)  # type: ignore[attr-defined]
    keys = _attention(model) | _ssm(the_spec(model, "mamba2"))
    keys |= {
        "attention.head_count_kv": heads,
        "attention.layer_norm_epsilon": model.norm_eps,
        "feed_forward_length": widths,
    }
    if moe:
        keys |= _sigmoid(moe) | {"expert_shared_count": 1, "expert_shared_feed_forward_length": moe.d_shared}
    return keys


def _deepseek(model: ModelConfig) -> Keys:
    """Heads are those of the absorbed form: one of keys, as wide as the latent and the rotated part."""
    mla, mlp, moe = (the_spec(model, kind) for kind in ("mla", "mlp", "moe"))
    keys = {
        "leading_dense_block_count": sum(layer.ffn_kind == "mlp" for layer in model.layers),
        "feed_forward_length": mlp.d_ff if mlp else moe.d_expert,
        "expert_feed_forward_length": moe.d_expert if moe else mlp.d_ff,
        "expert_shared_count": moe.d_shared // moe.d_expert if moe else 0,
        "attention.head_count": mla.n_heads,
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": mla.q_lora_rank or 0,
        "attention.kv_lora_rank": mla.kv_lora_rank,
        "attention.key_length": mla.kv_lora_rank + mla.qk_rope_head_dim,
        "attention.value_length": mla.kv_lora_rank,
        "attention.key_length_mla": mla.qk_nope_head_dim + mla.qk_rope_head_dim,
        "attention.value_length_mla": mla.v_head_dim,
        "rope.dimension_count": mla.qk_rope_head_dim,
        "rope.freq_base": mla.rope_theta,
    }
    return keys | (_sigmoid(moe) if moe else {})


def _twice(kind: str, name: str) -> Callable[[ModelConfig], Iterator[Need]]:
    """Twice as many inner channels as the model has."""

    def needs(model: ModelConfig) -> Iterator[Need]:
        wrong = [(path, spec) for path, spec in sections(model, kind) if spec.d_inner != 2 * model.d_model]
        if wrong:
            path, spec = wrong[0]
            remedy = ("expand=2", "n_heads=null")[: 1 + (kind == "mamba2")]
            overrides = tuple(f"{path}.{setting}" for path, _ in wrong for setting in remedy)
            reason = f"llama.cpp's {name} has 2 d_model inner channels"
            yield Need(f"{path}.expand", spec.d_inner / model.d_model, reason, overrides)

    return needs


def _some_mamba2(model: ModelConfig, name: str) -> Iterator[Need]:
    if the_spec(model, "mamba2") is None:
        yield Need("layers", "all attention", f"llama.cpp's {name} has a layer of mamba2")


def _mamba1_needs(model: ModelConfig) -> Iterator[Need]:
    yield from _twice("mamba1", "mamba")(model)
    yield from spec_needs(model, "mamba1", {"bias": False}, "llama.cpp's mamba")


def _granite_needs(model: ModelConfig) -> Iterator[Need]:
    yield from _some_mamba2(model, "granitehybrid")
    yield from _twice("mamba2", "granitehybrid")(model)
    yield from uniform_needs(model, "attention", ("head_dim", "rope_dim"), "llama.cpp's granitehybrid")
    found = {layer.ffn_kind for layer in model.layers}
    if found not in ({"mlp"}, {"moe"}):
        wanted = "moe" if "mlp" not in found and "moe" in found else "mlp"
        text = pattern_text((layer.letter, wanted) for layer in model.layers)
        reason = "llama.cpp's granitehybrid has the same kind of FFN, mlp or moe, after every layer"
        yield Need("FFNs", ",".join(sorted(found)), reason, (f"model.pattern='{text}'",))


def _nemotron_needs(model: ModelConfig) -> Iterator[Need]:
    yield from _some_mamba2(model, "nemotron_h")
    if {"mlp", "moe"} <= {layer.ffn_kind for layer in model.layers}:
        text = pattern_text(
            (layer.letter, "mlp" if layer.ffn_kind == "moe" else layer.ffn_kind) for layer in model.layers
        )
        reason = "llama.cpp's nemotron_h has one of the two"
        yield Need("FFNs", "mlp,moe", reason, (f"model.pattern='{text}'",))


def _deepseek_needs(model: ModelConfig) -> Iterator[Need]:
    if model.norm_eps != 1e-6:
        reason = "llama.cpp's deepseek2 has one epsilon for all norms, and that of latents is 1e-6"
        yield Need("model.norm_eps", model.norm_eps, reason, ("model.norm_eps=1e-6",))
    if len(model.layers) in _LITE_LAYERS and (mla := the_spec(model, "mla")) and mla.q_lora_rank is not None:
        reason = f"llama.cpp's deepseek2 ignores it in a model of {len(model.layers)} layers"
        yield Need("model.mla.q_lora_rank", mla.q_lora_rank, reason, ("model.mla.q_lora_rank=null",))


def _no_windows(model: ModelConfig) -> Iterator[Need]:
    yield from spec_needs(model, "attention", {"window": None}, "llama.cpp's qwen3")


TARGETS: tuple[Target, ...] = (
    Target("llama", _Llama(), _dense),
    Target("qwen3", Qwen3(), _dense, _no_windows, lifted=("windows",), pairs=False),
    Target("arcee", _Arcee(), _dense),
    Target("mamba", Mamba(), _mamba1, _mamba1_needs),
    Target("mamba2", Mamba2(), lambda model: _no_attention(_ssm(the_spec(model, "mamba2")))),
    Target(
        "granitehybrid",
        _Granite(),
        _granite,
        _granite_needs,
        lifted=("the FFN after",),
    ),
    Target("nemotron_h", NemotronH(), _nemotron_h, _nemotron_needs, split=True),
    Target("deepseek2", DeepseekV3(), _deepseek, _deepseek_needs),
)
