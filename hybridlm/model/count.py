"""What a built model costs: parameters, FLOPs, state bytes, and the layer table. The layers
themselves report it."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from hybridlm.config.resolve import resolve_layers
from hybridlm.layers.layer import PASSES, Phase
from hybridlm.model.block import Block

if TYPE_CHECKING:
    from hybridlm.model.lm import HybridLM


def parameters(model: torch.nn.Module) -> int:
    """Trainable numbers, a tied weight counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_token(model: HybridLM, context: int, phase: Phase) -> float:
    """Matrix-product FLOPs per token at this context; the head counts as a product also where it is tied."""
    total = PASSES[phase] * 2.0 * model.head_weight.numel()
    return total + sum(block_flops(cast(Block, block), context, phase) for block in model.blocks)


def block_flops(block: Block, context: int, phase: Phase) -> float:
    """Those of one layer."""
    return block.mixer.flops(context, phase) + (0.0 if block.ffn is None else block.ffn.flops(phase))


def state_bytes(model: HybridLM, context: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of all caches after ``context`` tokens."""
    return sum(cast(Block, block).mixer.state_bytes(context, batch, dtype) for block in model.blocks)


def count_text(number: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:.0f}"


def byte_text(number: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} B"


def layer_table(model: HybridLM, context: int) -> str:
    """Index, mixer, FFN, parameters and state bytes (one sequence of ``context`` tokens, fp32) of every layer, as plain
    text."""
    rows = [("layer", "mixer", "ffn", "parameters", f"state at {context}")]
    for i, (spec, module) in enumerate(zip(resolve_layers(model.config), model.blocks, strict=True)):
        block = cast(Block, module)
        state = block.mixer.state_bytes(context, 1, torch.float32)
        rows.append((str(i), spec.kind, spec.ffn_kind, count_text(parameters(block)), byte_text(state)))
    head = parameters(model) - sum(parameters(block) for block in model.blocks)
    tied = "tied" if model.lm_head is None else "untied"
    rows.append(("", f"embedding, norm, head ({tied}, {model.vocab_size} ids)", "", count_text(head), ""))
    rows.append(("", "total", "", count_text(parameters(model)), byte_text(state_bytes(model, context))))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    aligned = (str.rjust, str.ljust, str.ljust, str.rjust, str.rjust)
    return "\n".join(
        "  ".join(align(cell, width) for align, cell, width in zip(aligned, row, widths, strict=True)).rstrip()
        for row in rows
    )
