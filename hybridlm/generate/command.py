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
    from hybridlm.data.tokenizer import StreamDecoder
    from hybridlm.generate.engine import generate
    from hybridlm.generate.sampling import Sampler
    from hybridlm.hardware.device import inference_device

    loaded = load_run(run, inference_device(), ema=ema)
    sampler = Sampler(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    decoder = StreamDecoder(loaded.tokenizer)
    sys.stdout.write(prompt)
    for ids in generate(loaded.model, [loaded.tokenizer.encode(prompt)], tokens, sampler, stop_id=loaded.tokenizer.eos_id):
        sys.stdout.write(decoder.feed(ids))
        sys.stdout.flush()
    sys.stdout.write(decoder.flush() + "\n")
