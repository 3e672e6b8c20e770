"""Counts the parameters of every preset, of the models as they are built, and puts the table into docs/presets.md
between its two marks.

python docs/presets.py           # rewrite the table
"""

from __future__ import annotations

import re
from pathlib import Path

from hybridlm.cli.compose import compose_config
from hybridlm.config.groups import groups
from hybridlm.config.run import RunConfig
from hybridlm.layers.moe import MoE
from hybridlm.model.build import build_model
from hybridlm.model.count import parameters
from hybridlm.model.lm import HybridLM

PAGE = Path(__file__).resolve().parent / "presets.md"
MARKS = re.compile(r"(<!-- table: python docs/presets.py -->\n).*?(<!-- end of table -->)", re.DOTALL)
SIZES = ("default", "d12", "d16", "d20", "d26")
DWARFED = 0.4  # share of the parameters from which on a vocabulary is said to dwarf the model


def vocabulary(config: RunConfig) -> int:
    """Ids of the model: its own number, else those that a trained tokenizer is asked for."""
    return config.model.vocab_size or config.data.tokenizer.vocab_size


def share_of_vocabulary(model: HybridLM) -> float:
    """The share of the parameters that the embedding and an untied head have."""
    rows = model.embedding.weight.numel() * (1 if model.lm_head is None else 2)
    return rows / parameters(model)


def used_per_token(model: HybridLM) -> int:
    """Parameters without the experts that a token does not go to."""
    idle = 0
    for layer in model.modules():
        if isinstance(layer, MoE):
            of_experts = parameters(layer.experts)
            idle += of_experts - of_experts * layer.spec.top_k // layer.spec.n_experts
    return parameters(model) - idle


def row(preset: str, size: str) -> str:
    """A line of the table."""
    config = compose_config([f"model={preset}", f"size={size}"])
    model = build_model(config.model, vocabulary(config))
    share = share_of_vocabulary(model)
    return (
        f"| `{preset}` | `{size}` | {len(model.blocks)} | {config.model.d_model:,} | {config.data.seq_len:,} |"
        f" {vocabulary(config):,} | {parameters(model) / 1e6:,.2f}M | {used_per_token(model) / 1e6:,.2f}M |"
        f" {share:.0%}{', dwarfs the model' if share > DWARFED else ''} |\n"
    )


def table() -> str:
    """The presets at each size that they take, as Markdown."""
    presets = {preset: compose_config([f"model={preset}"]).model.sizes for preset in groups()["model"]}
    return (
        "| `model=` | `size=` | layers | width | context | ids | parameters | used per token | the vocabulary's share"
        " |\n|---|---|---|---|---|---|---|---|---|\n"
        + "".join(row(preset, size) for preset, sizes in presets.items() for size in SIZES if size in sizes)
    )


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(MARKS.sub(lambda match: match[1] + table() + match[2], text), encoding="utf-8")


if __name__ == "__main__":
    main()
