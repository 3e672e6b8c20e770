"""Text sampled at the end of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hybridlm.generate.engine import generate
from hybridlm.generate.sampling import Sampler

if TYPE_CHECKING:
    from hybridlm.checkpoint import LoadedRun
    from hybridlm.config.train import SamplesConfig
    from hybridlm.train.console import Console


def write_samples(loaded: LoadedRun, config: SamplesConfig, seed: int, path: Path, console: Console) -> None:
    """Continues each prompt with the checkpoint just written, which also shows that it loads."""
    texts = []
    for i, prompt in enumerate(config.prompts):
        sampler = Sampler(temperature=config.temperature, top_p=config.top_p, seed=seed + i)
        ids = generate(loaded.model, [loaded.tokenizer.encode(prompt)], config.tokens, sampler, stop_id=loaded.tokenizer.eos_id)
        texts.append(prompt + loaded.tokenizer.decode([step[0] for step in ids]))
        console.say(f"\nsample {i + 1}\n    " + texts[-1].replace("\n", "\n    "))
    path.write_text("\n\n----------------\n\n".join(texts) + "\n", encoding="utf-8")
