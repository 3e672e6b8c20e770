"""The peers of Hugging Face transformers, built from configs with random weights: nothing is downloaded.

Each has the shape of one of hybridlm's models (harness/ours.py), tied embeddings, and transformers' fastest path on a
CPU: scaled dot product attention, no cache in training, the weights' scale that training starts from (large logits
would slow their softmax down).
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from harness.ours import (
    D_EXPERT,
    D_FF,
    D_MODEL,
    HEADS,
    KV_LORA_RANK,
    N_EXPERTS,
    N_LAYERS,
    NOPE_DIM,
    ROPE_DIM,
    TOP_K,
    V_DIM,
    VOCAB,
)
from harness.turns import LeftOut

try:
    import transformers
    from transformers.utils.import_utils import is_mambapy_available
except ImportError as error:
    raise SystemExit(f'{error}; the benchmarks need the peers: pip install -e ".[dev]"') from error

MAMBA2_CHUNKS = (256, 128, 64, 32)  # the first is transformers' default
# transformers' ways to compute a mixture of experts; a third, batched_mm, copies an expert's weights for every token:
# tens of GiB here.
EXPERTS = ("grouped_mm", "eager")
STD = 0.02


def mamba2(chunk: int) -> transformers.PreTrainedModel:
    config = transformers.Mamba2Config(
        vocab_size=VOCAB,
        hidden_size=D_MODEL,
        num_hidden_layers=N_LAYERS,
        num_heads=8,
        head_dim=64,
        state_size=64,
        n_groups=1,
        chunk_size=chunk,
        initializer_range=STD,
        tie_word_embeddings=True,
    )
    return transformers.Mamba2ForCausalLM(config)


def mamba1() -> transformers.PreTrainedModel:
    """Needs the package mambapy: without it transformers silently takes a loop over tokens."""
    if not is_mambapy_available():
        raise LeftOut("the package mambapy is not installed")
    config = transformers.MambaConfig(
        vocab_size=VOCAB,
        hidden_size=D_MODEL,
        num_hidden_layers=N_LAYERS,
        state_size=16,
        use_mambapy=True,
        initializer_range=STD,
        tie_word_embeddings=True,
    )
    return transformers.MambaForCausalLM(config)


def llama(d_ff: int = D_FF) -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=D_MODEL,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        intermediate_size=d_ff,
        initializer_range=STD,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    return transformers.LlamaForCausalLM(config)


def bamba() -> transformers.PreTrainedModel:
    config = transformers.BambaConfig(
        vocab_size=VOCAB,
        hidden_size=D_MODEL,
        num_hidden_layers=N_LAYERS,
        intermediate_size=D_FF,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        attn_layer_indices=list(range(1, N_LAYERS, 2)),
        mamba_n_heads=8,
        mamba_d_head=64,
        mamba_d_state=64,
        initializer_range=STD,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    return transformers.BambaForCausalLM(config)


def deepseek(experts: str) -> transformers.PreTrainedModel:
    """No dense layer, no multi-token prediction, one group of experts: routers in every layer, as in
    ``ours.mla_moe``."""
    config = transformers.DeepseekV3Config(
        vocab_size=VOCAB,
        hidden_size=D_MODEL,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=None,
        kv_lora_rank=KV_LORA_RANK,
        qk_nope_head_dim=NOPE_DIM,
        qk_rope_head_dim=ROPE_DIM,
        v_head_dim=V_DIM,
        moe_intermediate_size=D_EXPERT,
        n_routed_experts=N_EXPERTS,
        num_experts_per_tok=TOP_K,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        first_k_dense_replace=0,
        num_mtp_layers=0,
        initializer_range=STD,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        experts_implementation=experts,
    )
    return transformers.DeepseekV3ForCausalLM(config)
