"""Text sampled from the model, on the way and at the end of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hybridlm.generate.engine import generate
from hybridlm.generate.sampling import Sampler

if TYPE_CHECKING:
    from hybridlm.config.logging import SamplesConfig
    from hybridlm.data.tokenizer import Tokenizer
    from hybridlm.model.lm import HybridLM


def sampled(model: HybridLM, tokenizer: Tokenizer, config: SamplesConfig, seed: int) -> list[str]:
    """Each prompt with its continuation. The model is in evaluation mode."""
    texts = []
    for i, prompt in enumerate(config.prompts):
        sampler = Sampler(temperature=config.temperature, top_p=config.top_p, seed=seed + i)
        ids = generate(model, [tokenizer.encode(prompt)], config.tokens, sampler, stop_id=tokenizer.eos_id)
        texts.append(prompt + tokenizer.decode([step[0] for step in ids]))
    return texts


def write_samples(path: Path, texts: Sequence[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n\n----------------\n\n".join(texts) + "\n", encoding="utf-8")
