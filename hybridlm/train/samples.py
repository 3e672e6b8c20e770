"""Text sampled from the model, on the way and at the end of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hybridlm.generate.engine import Engine
from hybridlm.generate.sampling import Sampling
from hybridlm.train.writing import write_or_say

if TYPE_CHECKING:
    from hybridlm.config.logging import SamplesConfig
    from hybridlm.data.tokenizer import Tokenizer
    from hybridlm.model.lm import HybridLM


def sampled(model: HybridLM, tokenizer: Tokenizer, config: SamplesConfig, seed: int) -> list[str]:
    """Each prompt with its continuation. The model is in evaluation mode."""
    sampling = Sampling(
        temperature=config.temperature,
        top_p=config.top_p,
        seed=seed,
        stop_ids=(tokenizer.eos_id,),
        max_new_tokens=config.tokens,
    )
    written = Engine(model, tokenizer).generate([tokenizer.encode(prompt) for prompt in config.prompts], sampling)
    return [prompt + completion.text for prompt, completion in zip(config.prompts, written, strict=True)]


def write_samples(path: Path, texts: Sequence[str], say: Callable[[str], None]) -> None:
    """``say`` prints a line on the first rank, where it fails."""
    write_or_say(path, "\n\n----------------\n\n".join(texts) + "\n", say)
