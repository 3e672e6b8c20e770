"""The models of hybridlm that the benchmarks step: d_model 256, 8 layers, 4096 ids, tied embeddings."""

from __future__ import annotations

from collections.abc import Callable

from hybridlm.config.ffns.mlp import MLPConfig
from hybridlm.config.ffns.moe import MoEConfig
from hybridlm.config.mixers.attention import AttentionConfig
from hybridlm.config.mixers.mamba3 import Mamba3Config
from hybridlm.config.mixers.mla import MLAConfig
from hybridlm.config.model import ModelConfig
from hybridlm.model.build import fresh_model
from hybridlm.model.lm import HybridLM

D_MODEL, N_LAYERS, VOCAB = 256, 8, 4096
HEADS = 4  # of attention
D_FF = 704  # of SwiGLU: 8/3 of d_model, rounded up to a multiple of 32
D_EXPERT, N_EXPERTS, TOP_K = 352, 8, 2
KV_LORA_RANK, NOPE_DIM, ROPE_DIM, V_DIM = 128, 48, 16, 64

_ROTARY = AttentionConfig(n_heads=HEADS, rope=True)
_MLP = MLPConfig(d_ff=D_FF)


def _model(pattern: str, n_layers: int, config: ModelConfig | None = None) -> HybridLM:
    shape = {"d_model": D_MODEL, "n_layers": n_layers, "pattern": pattern}
    return fresh_model((config or ModelConfig()).model_copy(update=shape), VOCAB, seed=0, device="cpu")


def mamba1(n_layers: int = N_LAYERS) -> HybridLM:
    return _model("M1:none", n_layers)


def mamba2(n_layers: int = N_LAYERS) -> HybridLM:
    return _model("M2:none", n_layers)


def mamba3(n_layers: int = N_LAYERS) -> HybridLM:
    """SISO."""
    return _model("M3:none", n_layers)


def mamba3_mimo(n_layers: int = N_LAYERS) -> HybridLM:
    """MIMO of rank 4. Its B and C are four times as wide, so that 6 heads instead of 8 make the parameters of the SISO
    model."""
    return _model("M3:none", n_layers, ModelConfig(mamba3=Mamba3Config(mimo_rank=4, expand=1.5)))


def transformer(n_layers: int = N_LAYERS) -> HybridLM:
    """Rotary attention and SwiGLU, the shape of HF's Llama."""
    return _model("T:mlp", n_layers, ModelConfig(attention=_ROTARY, mlp=_MLP))


def hybrid(n_layers: int = N_LAYERS) -> HybridLM:
    """Mamba-2 and attention in turn, SwiGLU after each: the shape of HF's Bamba."""
    return _model("M2:mlp T:mlp", n_layers, ModelConfig(attention=_ROTARY, mlp=_MLP))


def mla_moe(n_layers: int = N_LAYERS) -> HybridLM:
    """MLA and a mixture of experts with one shared expert: the shape of HF's DeepSeek-V3, which computes no router
    losses."""
    mla = MLAConfig(
        n_heads=HEADS, kv_lora_rank=KV_LORA_RANK, qk_nope_head_dim=NOPE_DIM, qk_rope_head_dim=ROPE_DIM, v_head_dim=V_DIM
    )
    moe = MoEConfig(
        n_experts=N_EXPERTS,
        top_k=TOP_K,
        d_expert=D_EXPERT,
        n_shared_experts=1,
        router="sigmoid",
        balance_loss_weight=0.0,
        z_loss_weight=0.0,
    )
    return _model("L:moe", n_layers, ModelConfig(mla=mla, moe=moe))


MAMBAS: dict[str, Callable[[int], HybridLM]] = {
    "mamba1": mamba1,
    "mamba2": mamba2,
    "mamba3": mamba3,
    "mamba3_mimo": mamba3_mimo,
}
