"""A small model for each thing that llama.cpp's architectures can hold, by the name of the architecture."""

from __future__ import annotations

ATTENTION = {"n_heads": 4, "n_kv_heads": 2}
ROTARY = ATTENTION | {"rope": True, "rope_theta": 500.0}
MAMBA = {"head_dim": 16, "d_state": 8, "n_groups": 2}
EXPERTS = {"n_experts": 4, "top_k": 2, "d_expert": 24, "n_shared_experts": 1}
SIGMOID = EXPERTS | {"router": "sigmoid", "routed_scaling_factor": 1.5, "n_expert_groups": 2, "topk_groups": 1}
LATENT = {"qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10}
MODELS = {
    "llama": {"pattern": "TT", "attention": ROTARY},
    "llama, heads of their own width": {
        "pattern": "TT",
        "attention": ROTARY | {"head_dim": 16},
        "tie_embeddings": False,
    },
    "qwen3": {"pattern": "TT", "attention": ROTARY | {"qk_norm": True, "head_dim": 16}},
    "arcee": {"pattern": "TT", "attention": ROTARY, "mlp": {"activation": "relu2"}},
    "mamba": {"pattern": "M1*2"},
    "mamba2": {"pattern": "M2*2", "mamba2": MAMBA, "tie_embeddings": False},
    "mamba2, other widths": {"pattern": "M2*2", "mamba2": MAMBA | {"expand": 1, "d_conv": 2}},
    "granitehybrid": {
        "pattern": "M2:mlp T M2:mlp",
        "attention": ATTENTION | {"scale": 0.3},
        "mamba2": MAMBA,
        "embedding_scale": 3.0,
        "residual_scale": 0.5,
        "logit_scale": 0.25,
    },
    "granitehybrid, rotary": {
        "pattern": "M2:mlp T",
        "attention": ROTARY | {"rope_fraction": 0.5, "head_dim": 16},
        "mamba2": MAMBA,
    },
    "granitehybrid, experts": {
        "pattern": "M2:moe T:moe",
        "attention": ATTENTION,
        "mamba2": MAMBA,
        "moe": EXPERTS,
        "tie_embeddings": False,
    },
    "granitehybrid, no shared expert": {
        "pattern": "M2:moe T:moe",
        "attention": ATTENTION,
        "mamba2": MAMBA,
        "moe": EXPERTS | {"n_shared_experts": 0},
    },
    "nemotron_h": {
        "pattern": "M2 T M2:mlp T:none",
        "attention": ATTENTION | {"head_dim": 16},
        "mamba2": MAMBA,
        "mlp": {"activation": "relu2"},
    },
    "nemotron_h, experts": {
        "pattern": "M2:moe T:moe M2",
        "attention": ATTENTION,
        "mamba2": MAMBA,
        "moe": SIGMOID | {"activation": "relu2"},
    },
    "deepseek2": {
        "pattern": "L:mlp L:moe",
        "mla": LATENT | {"q_lora_rank": 24},
        "moe": SIGMOID,
        "norm_eps": 1e-6,
    },
    "deepseek2, dense": {"pattern": "L:mlp*2", "mla": LATENT, "norm_eps": 1e-6},
    "deepseek2, rotated in halves": {
        "pattern": "L:moe*2",
        "mla": LATENT | {"rope_interleave": False},
        "moe": SIGMOID | {"topk_groups": 2, "n_shared_experts": 2, "norm_topk_prob": False},
        "norm_eps": 1e-6,
        "tie_embeddings": False,
    },
}


def section_of(case: str) -> dict:
    return {"d_model": 32, "norm_eps": 1e-5, "vocab_multiple": 64} | MODELS[case]
