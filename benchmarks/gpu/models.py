"""The models that gpu_check.py runs: hybridlm's presets in other orders of layers, mamba_ssm's own model, and those of
transformers."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from gpu.setting import Setting
from harness.turns import LeftOut
from torch import nn

from hybridlm.cli.compose import compose_config
from hybridlm.config.kernels import KernelsConfig
from hybridlm.config.mixers.attention import AttentionConfig
from hybridlm.config.mixers.mamba2 import Mamba2Config
from hybridlm.config.model import ModelConfig
from hybridlm.machine.device import cpu_facts, device_facts
from hybridlm.machine.kernels import KernelWork, chosen, verdicts
from hybridlm.model.build import fresh_model
from hybridlm.model.lm import HybridLM
from hybridlm.ops.kernels.choice import TORCH

ALL_ATTENTION, HYBRID = "all attention", "hybrid, 3 Mamba-2 to 1 attention"
PATTERNS = {
    ALL_ATTENTION: "T:mlp",
    "Mamba-1": "M1:mlp",
    "Mamba-2": "M2:mlp",
    "Mamba-3": "M3:mlp",
    HYBRID: "M2:mlp*3 T:mlp",
    "hybrid, 3 Mamba-3 to 1 attention": "M3:mlp*3 T:mlp",
}


def with_kernels(setting: Setting, model: HybridLM) -> HybridLM:
    """The model with the compiled kernels that ``kernels=auto`` would choose for it here; none on a CPU."""
    work = KernelWork(model.config.layers, setting.dtype, documents=False, scale=model.config.logit_scale)
    card = cpu_facts() if setting.dry else device_facts()
    found = verdicts(work, KernelsConfig(), card, setting.device)
    model.kernels = chosen(found, setting.dtype, setting.device)
    return model


def kernels_of(model: HybridLM) -> str:
    """The operators that run compiled kernels."""
    return ", ".join(name for name, backend in asdict(model.kernels).items() if backend != TORCH) or "torch"


def ours(setting: Setting, name: str, size: str = "d12") -> HybridLM:
    """The preset ``transformer`` at this size (12 layers, 768 wide at d12) with the layers that ``name`` stands for."""
    config = compose_config(["model=transformer", f"size={'tiny' if setting.dry else size}"]).model
    layers = max(4, config.n_layers or 0) // 4 * 4  # whole cycles of three and one
    config = config.model_copy(update={"pattern": PATTERNS[name], "n_layers": layers})
    return with_kernels(setting, fresh_model(config, setting.vocab, seed=0, device=setting.device))


@dataclass(frozen=True)
class Shape:
    """What a peer and our model of it share."""

    d_model: int
    n_layers: int
    d_state: int = 128
    head_dim: int = 64  # of Mamba-2
    heads: int = 12
    d_ff: int = 2048

    @staticmethod
    def of(setting: Setting) -> Shape:
        return Shape(64, 4, 16, 16, 4, 96) if setting.dry else Shape(768, 12)


def our_shape(setting: Setting, pattern: str) -> HybridLM:
    """``pattern`` at the peers' shape: rotary attention without QK-norm, SwiGLU, a tied head."""
    shape = Shape.of(setting)
    config = ModelConfig(
        d_model=shape.d_model,
        n_layers=shape.n_layers,
        pattern=pattern,
        attention=AttentionConfig(n_heads=shape.heads, rope=True),
        mamba2=Mamba2Config(d_state=shape.d_state, head_dim=shape.head_dim),
        mlp=compose_config([]).model.mlp.model_copy(update={"d_ff": shape.d_ff}),
    )
    return with_kernels(setting, fresh_model(config, setting.vocab, seed=0, device=setting.device))


def mamba_ssm_model(setting: Setting) -> nn.Module:
    """mamba_ssm's own Mamba-2 language model with its fused norms. Raises LeftOut where the package cannot be used."""
    if not setting.on_gpu:
        raise LeftOut("mamba_ssm needs a GPU")
    try:
        from mamba_ssm.models.config_mamba import MambaConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    except Exception as error:  # a package built for another torch raises anything
        raise LeftOut(f"mamba_ssm does not import: {type(error).__name__}: {error}") from None
    shape = Shape.of(setting)
    config = MambaConfig(
        d_model=shape.d_model,
        n_layer=shape.n_layers,
        vocab_size=setting.vocab,
        ssm_cfg={"layer": "Mamba2", "d_state": shape.d_state, "headdim": shape.head_dim},
    )
    return MambaLMHeadModel(config, device=setting.device)


def hf_model(setting: Setting, name: str) -> nn.Module:
    """transformers' Llama, Mamba2 or Bamba of the same shape, on its fastest path. Raises LeftOut without the
    package."""
    try:
        import transformers
    except ImportError as error:
        raise LeftOut(str(error)) from None
    shape = Shape.of(setting)
    mamba_heads = 2 * shape.d_model // shape.head_dim
    if name == "HF Llama":
        config = transformers.LlamaConfig(
            vocab_size=setting.vocab,
            hidden_size=shape.d_model,
            num_hidden_layers=shape.n_layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            intermediate_size=shape.d_ff,
            tie_word_embeddings=True,
            attn_implementation="sdpa",
        )
        model = transformers.LlamaForCausalLM(config)
    elif name == "HF Mamba2":
        config = transformers.Mamba2Config(
            vocab_size=setting.vocab,
            hidden_size=shape.d_model,
            num_hidden_layers=shape.n_layers,
            num_heads=mamba_heads,
            head_dim=shape.head_dim,
            state_size=shape.d_state,
            n_groups=1,
            tie_word_embeddings=True,
        )
        model = transformers.Mamba2ForCausalLM(config)
    else:
        config = transformers.BambaConfig(
            vocab_size=setting.vocab,
            hidden_size=shape.d_model,
            num_hidden_layers=shape.n_layers,
            intermediate_size=shape.d_ff,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            attn_layer_indices=list(range(3, shape.n_layers, 4)),
            mamba_n_heads=mamba_heads,
            mamba_d_head=shape.head_dim,
            mamba_d_state=shape.d_state,
            tie_word_embeddings=True,
            attn_implementation="sdpa",
        )
        model = transformers.BambaForCausalLM(config)
    return model.to(setting.device)
