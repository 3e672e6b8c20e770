"""A small model for every architecture of transformers, and the folder that it is there."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from hybridlm.config.load import validate_model
from hybridlm.interop.export import choose, weights_of
from hybridlm.interop.links import exported
from hybridlm.model.build import build_model
from hybridlm.model.lm import HybridLM

VOCAB = 260  # room for the byte tokenizer
ATTENTION = {"n_heads": 4, "n_kv_heads": 2}
MAMBA = {"head_dim": 16, "d_state": 8, "n_groups": 2}
EXPERTS = {"n_experts": 4, "top_k": 2, "d_expert": 24, "n_shared_experts": 1}
SIGMOID = EXPERTS | {"router": "sigmoid", "routed_scaling_factor": 1.5, "n_expert_groups": 2}
ROTARY = ATTENTION | {"rope": True, "rope_theta": 500.0}
DELTA = {"head_k_dim": 8}
LATENT = {"rope": False, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10}
CASES = {
    "LlamaForCausalLM": {"pattern": "T*2", "attention": ROTARY | {"head_dim": 12}},
    "Qwen3ForCausalLM": {
        "pattern": "STS",
        "attention": ROTARY | {"qk_norm": True, "head_dim": 16},
        "variants": {"S": {"mixer": "attention", "window": 5}},
        "tie_embeddings": False,
    },
    "ArceeForCausalLM": {"pattern": "TT", "attention": ROTARY, "mlp": {"activation": "relu2"}},
    "MambaForCausalLM": {"pattern": "M1*2", "mamba1": {"bias": True, "expand": 1.5}},
    "Mamba2ForCausalLM": {"pattern": "M2*2", "mamba2": MAMBA, "tie_embeddings": False},
    "GraniteMoeHybridForCausalLM": {
        "pattern": "M2:mlp T M2:mlp",
        "attention": ATTENTION | {"scale": 0.3},
        "mamba2": MAMBA,
        "embedding_scale": 3.0,
        "residual_scale": 0.5,
        "logit_scale": 0.25,
    },
    "GraniteMoeHybridForCausalLM, experts": {
        "pattern": "M2:moe T:moe",
        "attention": ROTARY,
        "mamba2": MAMBA,
        "moe": EXPERTS,
        "tie_embeddings": False,
    },
    "GraniteMoeHybridForCausalLM, no FFN": {"pattern": "M2 T:none", "attention": ATTENTION, "mamba2": MAMBA},
    "BambaForCausalLM": {
        "pattern": "M2:mlp T M2:mlp",
        "attention": ROTARY | {"rope_fraction": 0.5},
        "mamba2": MAMBA,
        "tie_embeddings": False,
    },
    "NemotronHForCausalLM": {
        "pattern": "M2 T M2:mlp T:none",
        "attention": ATTENTION | {"head_dim": 16},
        "mamba2": MAMBA,
        "mlp": {"activation": "relu2"},
    },
    "NemotronHForCausalLM, experts": {
        "pattern": "M2:moe T:moe",
        "attention": ATTENTION,
        "mamba2": MAMBA,
        "moe": SIGMOID | {"activation": "relu2"},
    },
    "Qwen3_5ForCausalLM": {
        "pattern": "G T G",
        "attention": ROTARY | {"qk_norm": True, "gate": True, "rope_fraction": 0.5, "head_dim": 16},
        "gdn": DELTA | {"n_k_heads": 2, "n_v_heads": 4},
        "norm_eps": 1e-6,
    },
    "Qwen3_5ForCausalLM, no gate": {
        "pattern": "G T",
        "attention": ATTENTION | {"qk_norm": True, "head_dim": 16},
        "gdn": DELTA,
        "norm_eps": 1e-6,
        "tie_embeddings": False,
    },
    "Qwen3NextForCausalLM": {
        "pattern": "G:moe T:mlp G:moe",
        "attention": ROTARY | {"qk_norm": True, "gate": True, "rope_fraction": 0.5, "head_dim": 16},
        "gdn": DELTA | {"n_k_heads": 2, "n_v_heads": 4, "head_v_dim": 12},
        "moe": EXPERTS | {"shared_gate": True, "d_shared": 40, "norm_topk_prob": False},
        "norm_eps": 1e-6,
    },
    "Qwen3NextForCausalLM, no gate": {
        "pattern": "G:moe T:moe",
        "attention": ATTENTION | {"qk_norm": True, "head_dim": 16},
        "gdn": DELTA,
        "moe": EXPERTS | {"shared_gate": True},
        "norm_eps": 1e-6,
        "tie_embeddings": False,
    },
    "KimiLinearForCausalLM": {"pattern": "K:mlp L:mlp", "mla": LATENT, "kda": DELTA, "norm_eps": 1e-6},
    "KimiLinearForCausalLM, experts": {
        "pattern": "K:mlp L:moe K:moe",
        "mla": LATENT,
        "kda": DELTA,
        "moe": SIGMOID,
        "norm_eps": 1e-6,
        "tie_embeddings": False,
    },
    "DeepseekV3ForCausalLM": {
        "pattern": "L:mlp L:moe",
        "mla": {"q_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10},
        "moe": SIGMOID,
    },
}


def model_of(case: str) -> HybridLM:
    """A model whose every parameter matters: norms are not 1, biases not 0."""
    config = validate_model({"d_model": 32, "norm_eps": 1e-5, "vocab_multiple": 8} | CASES[case])
    model = build_model(config, VOCAB).to_empty(device="cpu")
    torch.manual_seed(0)
    model.reset_parameters()
    for name, tensor in model.state_dict().items():
        if "norm" in name:
            nn.init.uniform_(tensor, 0.5, 1.5)
        elif name.endswith("bias"):
            tensor.add_(torch.randn_like(tensor) * 0.1)
    return model.eval()


def write_folder(path: Path, case: str) -> None:
    """The model without a tokenizer."""
    model = model_of(case)
    architecture = choose(model.config)
    assert architecture.name == case.split(",")[0]
    save_file(
        exported(architecture.links(model.config), weights_of(model)), path / "model.safetensors", {"format": "pt"}
    )
    config = architecture.config(model.config, VOCAB) | {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    (path / "config.json").write_text(json.dumps(config))
