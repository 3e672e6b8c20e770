"""Run folders as training leaves them, without training."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from hybridlm.config.load import to_yaml, validate_model
from hybridlm.config.model import ModelConfig
from hybridlm.config.run import RunConfig
from hybridlm.data.tokenizer import Tokenizer, byte_tokenizer
from hybridlm.files.sealed import write_sealed
from hybridlm.model.build import build_model
from hybridlm.runs.checkpoint import KEY, facts
from hybridlm.runs.run_folder import RunFolder


def untrained_run(
    path: Path, section: ModelConfig | dict, tokenizer: Tokenizer | None = None, *, every: bool = False
) -> Path:
    """A run folder whose weights are those of the start. every: norms are not 1 and biases not 0, so that each
    parameter matters."""
    folder, tokenizer = RunFolder(path), tokenizer or byte_tokenizer(["<|user|>"])
    model_section = validate_model(section) if isinstance(section, dict) else section
    path.mkdir(parents=True, exist_ok=True)
    folder.config.write_text(to_yaml(RunConfig(model=model_section)))
    tokenizer.save(folder.tokenizer)
    torch.manual_seed(0)
    model = build_model(model_section, tokenizer.vocab_size).to_empty(device="cpu")
    model.reset_parameters()
    for name, tensor in model.state_dict().items() if every else ():
        if "norm" in name:
            nn.init.uniform_(tensor, 0.5, 1.5)
        elif name.endswith("bias"):
            tensor.add_(torch.randn_like(tensor) * 0.1)
    ours = facts(model_section, tokenizer.vocab_size, tokenizer.fingerprint, accumulate=1) | {"step": 0}
    write_sealed(folder.weights, KEY, ours, dict(model.state_dict()))
    return path
