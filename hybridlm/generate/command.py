"""What `hybridlm generate` does."""

from __future__ import annotations

import sys

from hybridlm.config.section import ConfigError
from hybridlm.run_folder import find_run


def run_generate(
    run: str, *, prompt: str, tokens: int, temperature: float, top_p: float, top_k: int | None, seed: int, ema: bool = False
) -> None:
    """Continues ``prompt`` on standard output, token by token. ema: with the running average of the weights.

    ConfigError: the run cannot be loaded, or the prompt is empty.
    """
    if not prompt:
        raise ConfigError("--prompt: empty; give at least one character to continue")
    find_run(run)  # what is not there is said before torch is imported, which takes seconds

    from hybridlm.checkpoint import load_run
    from hybridlm.generate.engine import Engine
    from hybridlm.generate.sampling import Sampling
    from hybridlm.hardware import inference_device

    loaded = load_run(run, inference_device(), ema=ema)
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop_ids=(loaded.tokenizer.eos_id,), max_new_tokens=tokens
    )
    sys.stdout.write(prompt)
    for step in Engine(loaded.model, loaded.tokenizer).stream([loaded.tokenizer.encode(prompt)], sampling):
        sys.stdout.write(step.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
